//! Rules in the config dump, in the shape that `istioctl ztunnel-config policy` reads.

use std::sync::Arc;

use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};

use super::authorization::Authorization;
use super::authorization::matching::{Clause, Match, Rule, ServiceAccount, Values};
use super::cidr::Cidr;
use super::pattern::Pattern;

/// The rules of an AuthorizationPolicy as they are evaluated: rules of clauses of matches. Other
/// policies have none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyRules(Option<Arc<Authorization>>);

impl PolicyRules {
    pub(super) fn of(policy: &Arc<Authorization>) -> Self {
        Self(Some(policy.clone()))
    }
}

impl Serialize for PolicyRules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().flat_map(|policy| &policy.rules))
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(&self.0)
    }
}

/// In Istio's ztunnel a clause without matches matches everything and an empty match nothing: the
/// opposite of the types here.
impl Serialize for Clause {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0.iter().any(|found| found.0.is_empty()) {
            return serializer.serialize_seq(Some(0))?.end();
        }
        match self.0.is_empty() {
            true => serializer.collect_seq([Match::default()]),
            false => serializer.collect_seq(&self.0),
        }
    }
}

/// No field is written twice: each constraint has its own.
impl Serialize for Match {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for constraint in &self.0 {
            let (key, not) = constraint.values.keys();
            map.serialize_entry(
                if constraint.negated { not } else { key },
                &constraint.values,
            )?;
        }
        map.end()
    }
}

impl Values {
    fn keys(&self) -> (&'static str, &'static str) {
        match self {
            Values::Principals(_) => ("principals", "notPrincipals"),
            Values::Namespaces(_) => ("namespaces", "notNamespaces"),
            Values::ServiceAccounts(_) => ("serviceAccounts", "notServiceAccounts"),
            Values::TrustDomains(_) => ("trustDomains", "notTrustDomains"),
            Values::SourceIps(_) => ("sourceIps", "notSourceIps"),
            Values::DestinationIps(_) => ("destinationIps", "notDestinationIps"),
            Values::DestinationPorts(_) => ("destinationPorts", "notDestinationPorts"),
        }
    }
}

impl Serialize for Values {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Values::Principals(values)
            | Values::Namespaces(values)
            | Values::TrustDomains(values) => serializer.collect_seq::<&Vec<Pattern>>(values),
            Values::ServiceAccounts(values) => serializer.collect_seq(values),
            Values::SourceIps(values) | Values::DestinationIps(values) => {
                serializer.collect_seq(values.iter().map(Cidr::to_string))
            }
            Values::DestinationPorts(values) => serializer.collect_seq(values),
        }
    }
}

impl Serialize for ServiceAccount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("namespace", &self.namespace)?;
        map.serialize_entry("serviceAccount", &self.name)?;
        map.end()
    }
}
