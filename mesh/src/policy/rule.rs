//! Rules of AuthorizationPolicies, ready to be asked.
//!
//! A policy matches if one of its rules does, a rule if all of its clauses do (`to`, `from`, and
//! each `when`), a clause if one of its matches does, and a match if all of its constraints hold.

use std::net::{IpAddr, SocketAddr};

use spiffe::SpiffeId;

use super::InboundConnection;
use super::cidr::Cidr;
use super::text::Pattern;

/// Without clauses it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rule(pub(super) Vec<Clause>);

/// Without matches it matches nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Clause(pub(super) Vec<Match>);

/// Without constraints it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Match(pub(super) Vec<Constraint>);

/// One field: the connection has one of these values, or none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Constraint {
    pub(super) values: Values,
    pub(super) negated: bool,
}

/// What a connection is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Values {
    Principals(Vec<Pattern>),
    Namespaces(Vec<Pattern>),
    ServiceAccounts(Vec<ServiceAccount>),
    TrustDomains(Vec<Pattern>),
    SourceIps(Vec<Cidr>),
    DestinationIps(Vec<Cidr>),
    DestinationPorts(Vec<u16>),
}

/// A service account of any trust domain, as for Istio.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceAccount {
    pub(super) namespace: Box<str>,
    pub(super) name: Box<str>,
}

/// What rules ask of an connection, worked out once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'a> {
    source: Option<Source<'a>>,
    source_ip: IpAddr,
    destination: SocketAddr,
}

#[derive(Clone, Copy, Debug)]
struct Source<'a> {
    id: &'a SpiffeId,
    /// Empty unless the identity has Istio's form.
    namespace: &'a str,
    service_account: &'a str,
}

impl<'a> Facts<'a> {
    pub(super) fn new(connection: &InboundConnection<'a>) -> Self {
        Self {
            source: connection.source_identity.map(Source::new),
            source_ip: connection.source_ip,
            destination: connection.destination,
        }
    }
}

impl<'a> Source<'a> {
    fn new(id: &'a SpiffeId) -> Self {
        let account = id.path().strip_prefix("/ns/");
        let account = account.and_then(|rest| rest.split_once("/sa/"));
        let (namespace, service_account) = account
            .filter(|(namespace, name)| !namespace.contains('/') && !name.contains('/'))
            .unwrap_or_default();
        Self {
            id,
            namespace,
            service_account,
        }
    }
}

impl Rule {
    pub(super) fn matches(&self, facts: &Facts<'_>) -> bool {
        self.0.iter().all(|clause| clause.matches(facts))
    }
}

impl Clause {
    fn matches(&self, facts: &Facts<'_>) -> bool {
        self.0
            .iter()
            .any(|m| m.0.iter().all(|constraint| constraint.holds(facts)))
    }
}

impl Constraint {
    fn holds(&self, facts: &Facts<'_>) -> bool {
        self.values.hold_one_of(facts) != self.negated
    }
}

impl Values {
    /// A connection without identity has no principal, namespace, account or trust domain: it is
    /// none of those that are listed, so it fails `principals` and passes `notPrincipals`.
    fn hold_one_of(&self, facts: &Facts<'_>) -> bool {
        let of_source =
            |test: &dyn Fn(&Source<'_>) -> bool| facts.source.as_ref().is_some_and(test);
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
            Values::SourceIps(blocks) => contain(blocks, facts.source_ip),
            Values::DestinationIps(blocks) => contain(blocks, facts.destination.ip()),
            Values::DestinationPorts(ports) => ports.contains(&facts.destination.port()),
        }
    }
}

fn contain(blocks: &[Cidr], ip: IpAddr) -> bool {
    let ip = ip.to_canonical();
    blocks.iter().any(|block| block.contains(ip))
}
