//! NetworkPolicy, ingress only.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Attempt, Denial};
use crate::compile::Faults;
use crate::model::{Model, Workload};
use crate::objects::Policy;

/// One NetworkPolicy, read by itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NetworkPolicy {}

/// Reads a policy. Always yields one: what cannot be read denies.
pub(crate) fn read(object: &Policy, faults: &mut Faults) -> NetworkPolicy {
    let _ = (object, faults);
    NetworkPolicy {}
}

impl NetworkPolicy {
    /// A label that every pod it selects has, so that not every pod need be asked; `None` if any
    /// pod of its namespace may be selected.
    pub(crate) fn required_label(&self) -> Option<(&str, &str)> {
        None
    }

    /// Whether it restricts the ingress of a pod of its namespace with these labels.
    pub(crate) fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        let _ = labels;
        false
    }
}

/// All the policies that restrict the ingress of one workload. Never empty.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct IngressRules(Vec<Arc<NetworkPolicy>>);

impl IngressRules {
    pub(crate) fn new(policies: Vec<Arc<NetworkPolicy>>) -> Self {
        Self(policies)
    }

    /// Whether any of the policies admits the connection. Does not allocate.
    pub(crate) fn admits(
        &self,
        attempt: &Attempt<'_>,
        workload: &Workload,
        model: &Model,
    ) -> Result<(), Denial> {
        let _ = (attempt, workload, model, &self.0);
        Ok(())
    }
}
