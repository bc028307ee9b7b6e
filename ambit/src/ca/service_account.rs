//! Service accounts, and patterns of them: the names that tokens, requests and identities contain.

use std::fmt;

use spiffe::{SpiffeId, TrustDomain};

/// Prefix of the subject of a service account's token, as in Kubernetes.
const SUBJECT_PREFIX: &str = "system:serviceaccount:";
/// Longest namespace name (a DNS label).
const MAX_NAMESPACE_BYTES: usize = 63;
/// Longest service account name (a DNS subdomain).
const MAX_NAME_BYTES: usize = 253;

/// A service account of this trust domain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceAccount {
    namespace: String,
    name: String,
}

impl ServiceAccount {
    /// A service account, if Kubernetes permits both names. Such names contain no separator and no
    /// wildcard.
    pub fn new(namespace: &str, name: &str) -> Option<Self> {
        let is_valid = is_dns_name(namespace, MAX_NAMESPACE_BYTES)
            && !namespace.contains('.')
            && is_dns_name(name, MAX_NAME_BYTES);
        is_valid.then(|| Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Parses a token's subject, `system:serviceaccount:<namespace>:<name>`.
    pub fn from_subject(subject: &str) -> Option<Self> {
        let (namespace, name) = subject.strip_prefix(SUBJECT_PREFIX)?.split_once(':')?;
        Self::new(namespace, name)
    }

    /// The subject of the account's tokens.
    pub fn subject(&self) -> String {
        format!("{SUBJECT_PREFIX}{}:{}", self.namespace, self.name)
    }

    /// The account of `spiffe://<trust domain>/ns/<namespace>/sa/<name>`; no other form is accepted.
    pub fn from_identity(identity: &SpiffeId) -> Option<Self> {
        let mut path = identity.path().strip_prefix("/ns/")?.split('/');
        let (namespace, sa, name) = (path.next()?, path.next()?, path.next()?);
        if sa != "sa" || path.next().is_some() {
            return None;
        }
        Self::new(namespace, name)
    }

    /// The account's identity.
    pub fn identity(&self, trust_domain: &TrustDomain) -> Option<SpiffeId> {
        let path = ["ns", &self.namespace, "sa", &self.name];
        SpiffeId::from_segments(trust_domain.clone(), &path).ok()
    }
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

fn is_dns_name(text: &str, max_bytes: usize) -> bool {
    let is_separator = |c: char| c == '-' || c == '.';
    let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || is_separator(c);
    (1..=max_bytes).contains(&text.len())
        && text.chars().all(is_allowed)
        && !text.starts_with(is_separator)
        && !text.ends_with(is_separator)
}

/// A set of service accounts: a list of `namespace/name`, `namespace/*` and `*/*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceAccountPatterns(Vec<Pattern>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    Account(ServiceAccount),
    Namespace(String),
    All,
}

impl ServiceAccountPatterns {
    /// Parses a list of patterns.
    ///
    /// # Errors
    /// Fails with the first invalid pattern: without it the list would mean something else.
    pub fn parse<S: AsRef<str>>(patterns: &[S]) -> Result<Self, String> {
        let parse = |pattern: &S| {
            let pattern = pattern.as_ref();
            Pattern::parse(pattern).ok_or_else(|| pattern.to_owned())
        };
        patterns
            .iter()
            .map(parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether one of the patterns matches the account.
    pub fn matches(&self, account: &ServiceAccount) -> bool {
        self.0.iter().any(|pattern| match pattern {
            Pattern::Account(one) => one == account,
            Pattern::Namespace(namespace) => *namespace == account.namespace,
            Pattern::All => true,
        })
    }
}

impl Pattern {
    fn parse(pattern: &str) -> Option<Self> {
        match pattern.split_once('/')? {
            ("*", "*") => Some(Self::All),
            (namespace, "*") => ServiceAccount::new(namespace, "any")
                .map(|account| Self::Namespace(account.namespace)),
            (namespace, name) => ServiceAccount::new(namespace, name).map(Self::Account),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(text: &str) -> ServiceAccount {
        let (namespace, name) = text.split_once('/').unwrap();
        ServiceAccount::new(namespace, name).unwrap()
    }

    #[test]
    fn only_identities_of_istios_form_are_service_accounts() {
        let parse = |text: &str| {
            let identity = SpiffeId::new(text).unwrap();
            ServiceAccount::from_identity(&identity).map(|account| account.to_string())
        };
        assert_eq!(
            parse("spiffe://cluster.local/ns/shop/sa/web"),
            Some("shop/web".to_owned())
        );
        for invalid in [
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/shop",
            "spiffe://cluster.local/ns/shop/sa",
            "spiffe://cluster.local/ns/shop/sa/web/more",
            "spiffe://cluster.local/ns/shop/SA/web",
            "spiffe://cluster.local/ns/Shop/sa/web",
            "spiffe://cluster.local/sa/web/ns/shop",
            "spiffe://cluster.local/ns/shop.x/sa/web",
        ] {
            assert_eq!(parse(invalid), None, "{invalid}");
        }
    }

    #[test]
    fn only_subjects_of_service_accounts_are_parsed() {
        let parse =
            |subject| ServiceAccount::from_subject(subject).map(|account| account.to_string());
        assert_eq!(
            parse("system:serviceaccount:istio-system:ztunnel"),
            Some("istio-system/ztunnel".to_owned())
        );
        for invalid in [
            "istio-system:ztunnel",
            "system:serviceaccount:istio-system",
            "system:serviceaccount::ztunnel",
            "system:serviceaccount:a:b:c",
            "system:serviceaccount:*:*",
            "system:node:a",
        ] {
            assert_eq!(parse(invalid), None, "{invalid}");
        }
    }

    #[test]
    fn patterns_match_only_the_accounts_they_name() {
        let patterns = ServiceAccountPatterns::parse(&["shop/web", "bank/*"]).unwrap();
        assert!(patterns.matches(&account("shop/web")));
        assert!(patterns.matches(&account("bank/any")));
        assert!(!patterns.matches(&account("shop/web2")));
        assert!(!patterns.matches(&account("banker/x")));
        assert!(
            ServiceAccountPatterns::parse(&["*/*"])
                .unwrap()
                .matches(&account("a/b"))
        );
        assert!(!ServiceAccountPatterns::default().matches(&account("a/b")));
    }

    #[test]
    fn list_with_an_invalid_pattern_is_an_error() {
        for pattern in [
            "*",
            "shop",
            "*/web",
            "shop/w*",
            "/",
            "shop/",
            "",
            "shop/web/x",
        ] {
            let list = ServiceAccountPatterns::parse(&["shop/web", pattern]);
            assert_eq!(list, Err(pattern.to_owned()));
        }
    }
}
