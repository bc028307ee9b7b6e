//! Service accounts: by what name a caller goes, and for which ones it may speak.

use std::fmt;

use spiffe::{SpiffeId, TrustDomain};

/// What the subject of a service account's token begins with, as in Kubernetes.
const SUBJECT: &str = "system:serviceaccount:";
/// Longest name of a namespace (a DNS label) and of a service account (a DNS subdomain).
const NAMESPACE_MOST: usize = 63;
const NAME_MOST: usize = 253;

/// A service account of this trust domain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Account {
    namespace: String,
    name: String,
}

impl Account {
    /// An account, if both names are such as Kubernetes allows: nothing in them can be taken for a
    /// separator or a pattern.
    pub fn new(namespace: &str, name: &str) -> Option<Self> {
        let labels = |text: &str| {
            text.bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
        };
        let fits = |text: &str, most| {
            let inner = text.trim_matches(['-', '.']);
            !text.is_empty() && text.len() <= most && inner.len() == text.len()
        };
        let named = fits(namespace, NAMESPACE_MOST)
            && !namespace.contains('.')
            && labels(namespace)
            && fits(name, NAME_MOST)
            && labels(name);
        named.then(|| Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    /// From a token's subject, `system:serviceaccount:<namespace>:<name>`.
    pub fn from_subject(subject: &str) -> Option<Self> {
        let (namespace, name) = subject.strip_prefix(SUBJECT)?.split_once(':')?;
        Self::new(namespace, name)
    }

    /// The subject of its tokens.
    pub fn subject(&self) -> String {
        format!("{SUBJECT}{}:{}", self.namespace, self.name)
    }

    /// From exactly `spiffe://<trust domain>/ns/<namespace>/sa/<name>`.
    pub fn from_identity(identity: &SpiffeId) -> Option<Self> {
        let mut path = identity.path().strip_prefix("/ns/")?.split('/');
        let (namespace, sa, name) = (path.next()?, path.next()?, path.next()?);
        if sa != "sa" || path.next().is_some() {
            return None;
        }
        Self::new(namespace, name)
    }

    /// Its identity.
    pub fn identity(&self, trust_domain: &TrustDomain) -> Option<SpiffeId> {
        let path = ["ns", &self.namespace, "sa", &self.name];
        SpiffeId::from_segments(trust_domain.clone(), &path).ok()
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which accounts: `namespace/name`, `namespace/*`, or `*/*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounts(Vec<Pattern>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    One(Account),
    Namespace(String),
    All,
}

impl Accounts {
    /// Understands a list of patterns.
    ///
    /// # Errors
    /// Fails with the first that is none: a list that is half understood would be another list.
    pub fn parse<S: AsRef<str>>(patterns: &[S]) -> Result<Self, String> {
        let patterns = patterns.iter().map(|pattern| {
            let pattern = pattern.as_ref();
            let understood = match pattern.split_once('/') {
                Some(("*", "*")) => Some(Pattern::All),
                Some((namespace, "*")) => Account::new(namespace, "any")
                    .map(|account| Pattern::Namespace(account.namespace)),
                Some((namespace, name)) => Account::new(namespace, name).map(Pattern::One),
                None => None,
            };
            understood.ok_or_else(|| pattern.to_owned())
        });
        patterns.collect::<Result<_, _>>().map(Self)
    }

    /// Whether the account is one of them.
    pub fn contain(&self, account: &Account) -> bool {
        self.0.iter().any(|pattern| match pattern {
            Pattern::One(one) => one == account,
            Pattern::Namespace(namespace) => *namespace == account.namespace,
            Pattern::All => true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(text: &str) -> Account {
        let (namespace, name) = text.split_once('/').unwrap();
        Account::new(namespace, name).unwrap()
    }

    #[test]
    fn an_identity_is_an_account_only_in_exactly_the_form_of_istio() {
        let from = |text: &str| {
            let identity = SpiffeId::new(text).unwrap();
            Account::from_identity(&identity).map(|account| account.to_string())
        };
        assert_eq!(
            from("spiffe://cluster.local/ns/shop/sa/web"),
            Some("shop/web".to_owned())
        );
        for other in [
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/shop",
            "spiffe://cluster.local/ns/shop/sa",
            "spiffe://cluster.local/ns/shop/sa/web/more",
            "spiffe://cluster.local/ns/shop/SA/web",
            "spiffe://cluster.local/ns/Shop/sa/web",
            "spiffe://cluster.local/sa/web/ns/shop",
            "spiffe://cluster.local/ns/shop.x/sa/web",
        ] {
            assert_eq!(from(other), None, "{other}");
        }
    }

    #[test]
    fn a_subject_is_one_of_a_service_account_or_nothing() {
        let of = |subject| Account::from_subject(subject).map(|account| account.to_string());
        assert_eq!(
            of("system:serviceaccount:istio-system:ztunnel"),
            Some("istio-system/ztunnel".to_owned())
        );
        for other in [
            "istio-system:ztunnel",
            "system:serviceaccount:istio-system",
            "system:serviceaccount::ztunnel",
            "system:serviceaccount:a:b:c",
            "system:serviceaccount:*:*",
            "system:node:a",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn patterns_contain_what_they_name_and_no_more() {
        let some = Accounts::parse(&["shop/web", "bank/*"]).unwrap();
        assert!(some.contain(&account("shop/web")));
        assert!(some.contain(&account("bank/anyone")));
        assert!(!some.contain(&account("shop/web2")));
        assert!(!some.contain(&account("banker/x")));
        assert!(Accounts::parse(&["*/*"]).unwrap().contain(&account("a/b")));
        assert!(!Accounts::default().contain(&account("a/b")));
    }

    #[test]
    fn a_list_with_a_pattern_that_is_none_is_no_list() {
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
            let list = Accounts::parse(&["shop/web", pattern]);
            assert_eq!(list, Err(pattern.to_owned()));
        }
    }
}
