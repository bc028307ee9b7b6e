//! Whether a rule of an AuthorizationPolicy matches a connection.
//!
//! A policy matches if one of its rules does, a rule if all of its clauses do (`to`, `from`, and
//! each `when`), a clause if one of its matches does, and a match if all of its constraints hold.

use std::net::IpAddr;

use crate::policy::cidr::Cidr;
use crate::policy::connection::{ConnectionAttributes, SourceIdentity};
use crate::policy::pattern::Pattern;

/// One rule. Without clauses it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::policy) struct Rule(pub(in crate::policy) Vec<Clause>);

/// `to`, `from` or one entry of `when`. Without matches it matches nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::policy) struct Clause(pub(in crate::policy) Vec<Match>);

/// One entry of a clause. Without constraints it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::policy) struct Match(pub(in crate::policy) Vec<Constraint>);

/// One field: the connection has one of these values, or none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::policy) struct Constraint {
    pub(in crate::policy) values: Values,
    pub(in crate::policy) negated: bool,
}

/// The values of one attribute of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::policy) enum Values {
    Principals(Vec<Pattern>),
    Namespaces(Vec<Pattern>),
    ServiceAccounts(Vec<ServiceAccount>),
    TrustDomains(Vec<Pattern>),
    SourceIps(Vec<Cidr>),
    DestinationIps(Vec<Cidr>),
    DestinationPorts(Vec<u16>),
}

/// A service account of any trust domain, as in Istio.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::policy) struct ServiceAccount {
    pub(in crate::policy) namespace: Box<str>,
    pub(in crate::policy) name: Box<str>,
}

impl Rule {
    pub(in crate::policy) fn matches(&self, connection: &ConnectionAttributes<'_>) -> bool {
        self.0.iter().all(|clause| clause.matches(connection))
    }
}

impl Clause {
    fn matches(&self, connection: &ConnectionAttributes<'_>) -> bool {
        self.0
            .iter()
            .any(|m| m.0.iter().all(|constraint| constraint.holds(connection)))
    }
}

impl Constraint {
    fn holds(&self, connection: &ConnectionAttributes<'_>) -> bool {
        self.values.match_any(connection) != self.negated
    }
}

impl Values {
    /// A connection without identity has no principal, namespace, account or trust domain: none of
    /// the listed values matches, so it fails `principals` and passes `notPrincipals`.
    fn match_any(&self, connection: &ConnectionAttributes<'_>) -> bool {
        let of_source = |test: &dyn Fn(&SourceIdentity<'_>) -> bool| {
            connection.source.as_ref().is_some_and(test)
        };
        match self {
            Values::Principals(patterns) => of_source(&|source| {
                let (trust_domain, path) = (source.id.trust_domain_name(), source.id.path());
                let matches = |p: &Pattern| p.matches_joined(trust_domain, path);
                patterns.iter().any(matches)
            }),
            Values::Namespaces(patterns) => {
                of_source(&|source| patterns.iter().any(|p| p.matches(source.namespace)))
            }
            Values::ServiceAccounts(accounts) => of_source(&|source| {
                let is = |account: &ServiceAccount| {
                    *account.namespace == *source.namespace
                        && *account.name == *source.service_account
                };
                accounts.iter().any(is)
            }),
            Values::TrustDomains(patterns) => of_source(&|source| {
                let trust_domain = source.id.trust_domain_name();
                patterns.iter().any(|p| p.matches(trust_domain))
            }),
            Values::SourceIps(blocks) => contain(blocks, connection.source_ip),
            Values::DestinationIps(blocks) => contain(blocks, connection.destination.ip()),
            Values::DestinationPorts(ports) => ports.contains(&connection.destination.port()),
        }
    }
}

fn contain(blocks: &[Cidr], ip: IpAddr) -> bool {
    blocks.iter().any(|block| block.contains(ip))
}
