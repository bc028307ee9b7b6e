//! Trust domain aliases: the mesh under several names.
//!
//! A principal with the trust domain, an alias or `cluster.local` (which documentation uses for the
//! mesh's own trust domain) matches the same account under each of these names (Istio's trust domain
//! migration). Other principals are unchanged.

use spiffe::TrustDomain;

/// The placeholder that documentation uses for the mesh's own trust domain.
const OWN: &str = "cluster.local";

/// The trust domain of the mesh and its aliases; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TrustDomains(Vec<Box<str>>);

impl TrustDomains {
    pub(super) fn new(trust_domain: &TrustDomain, aliases: &[TrustDomain]) -> Self {
        let mut names: Vec<Box<str>> = vec![trust_domain.as_str().into()];
        for alias in aliases {
            if !names.iter().any(|name| **name == *alias.as_str()) {
                names.push(alias.as_str().into());
            }
        }
        Self(names)
    }

    /// Expands a principal of a policy to all names of the trust domain.
    pub(super) fn principals(&self, principal: &str) -> Vec<String> {
        let as_is = || vec![principal.to_owned()];
        // Only the full form, `<trust domain>/ns/<namespace>/sa/<account>`, names a trust domain.
        let Some((trust_domain, path)) = principal.split_once('/') else {
            return as_is();
        };
        if path.split('/').count() != 4 || trust_domain == "*" {
            return as_is();
        }
        let suffix = trust_domain.strip_prefix('*');
        let is_ours = |name: &str| match suffix {
            Some(suffix) => name.ends_with(suffix),
            None => name == trust_domain,
        };
        if trust_domain != OWN && !self.0.iter().any(|name| is_ours(name)) {
            return as_is();
        }
        let mut principals = Vec::with_capacity(self.0.len());
        for name in &self.0 {
            let expanded = match suffix {
                Some(suffix) if name.ends_with(suffix) => principal.to_owned(),
                _ => format!("{name}/{path}"),
            };
            if !principals.contains(&expanded) {
                principals.push(expanded);
            }
        }
        principals
    }

    /// Expands a trust domain of a policy to all names of it.
    pub(super) fn trust_domains(&self, trust_domain: &str) -> Vec<String> {
        match self.0.iter().any(|name| **name == *trust_domain) {
            true => self.0.iter().map(|name| name.to_string()).collect(),
            false => vec![trust_domain.to_owned()],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains(names: &[&str]) -> TrustDomains {
        let names: Vec<_> = names.iter().map(|n| TrustDomain::new(n).unwrap()).collect();
        TrustDomains::new(&names[0], &names[1..])
    }

    #[test]
    fn principal_of_the_mesh_expands_to_all_aliases() {
        let cases: [(&[&str], &str, &[&str]); 12] = [
            (&["td1"], "td1/ns/foo/sa/bar", &["td1/ns/foo/sa/bar"]),
            (
                &["td2", "td1"],
                "td1/ns/foo/sa/bar",
                &["td2/ns/foo/sa/bar", "td1/ns/foo/sa/bar"],
            ),
            (
                &["td2", "td1"],
                "td2/ns/foo/sa/*",
                &["td2/ns/foo/sa/*", "td1/ns/foo/sa/*"],
            ),
            // The placeholder of documentation.
            (
                &["td2", "td1"],
                "cluster.local/ns/foo/sa/bar",
                &["td2/ns/foo/sa/bar", "td1/ns/foo/sa/bar"],
            ),
            // A foreign trust domain.
            (&["td2", "td1"], "td9/ns/foo/sa/bar", &["td9/ns/foo/sa/bar"]),
            // No trust domain.
            (&["td2", "td1"], "*/ns/foo/sa/bar", &["*/ns/foo/sa/bar"]),
            (&["td2", "td1"], "*/sa/bar", &["*/sa/bar"]),
            (&["td2", "td1"], "*", &["*"]),
            (&["td2", "td1"], "td1/ns/foo/*", &["td1/ns/foo/*"]),
            // A suffix of a trust domain.
            (
                &["old-td", "new-td"],
                "*-td/ns/foo/sa/bar",
                &["*-td/ns/foo/sa/bar"],
            ),
            (
                &["old-td", "other"],
                "*-td/ns/foo/sa/bar",
                &["*-td/ns/foo/sa/bar", "other/ns/foo/sa/bar"],
            ),
            (&["td1", "td1"], "td1/ns/foo/sa/bar", &["td1/ns/foo/sa/bar"]),
        ];
        for (names, principal, expected) in cases {
            assert_eq!(
                domains(names).principals(principal),
                expected,
                "{principal}"
            );
        }
    }

    #[test]
    fn trust_domain_of_the_mesh_expands_to_all_aliases() {
        let domains = domains(&["td1", "td2"]);
        assert_eq!(domains.trust_domains("td2"), ["td1", "td2"]);
        assert_eq!(domains.trust_domains("td3"), ["td3"]);
        assert_eq!(domains.trust_domains("td*"), ["td*"]);
    }
}
