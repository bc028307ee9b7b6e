//! Namespaces: the opt-in that their pods inherit.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;

use super::names::{self, Form, Scope};
use super::values;
use crate::compile::fault::Faults;
use crate::model::Namespace;

pub(super) fn read(object: &core::Namespace, faults: &mut Faults) -> Option<Namespace> {
    names::check(&object.metadata, Scope::Cluster(Form::Label), faults);
    let namespace = Namespace {
        name: object.metadata.name.as_deref()?.into(),
        mode: values::dataplane_mode(&object.metadata, faults).unwrap_or_default(),
        distribution: values::distribution_annotation(&object.metadata, faults),
        labels: Arc::new(object.metadata.labels.clone().unwrap_or_default()),
    };
    (!faults.is_fatal()).then_some(namespace)
}
