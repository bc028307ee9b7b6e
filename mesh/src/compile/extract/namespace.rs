//! Extracts namespaces: the mode and traffic distribution that pods and services inherit.

use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;

use super::values;
use crate::diagnostic::Diagnostics;
use crate::model::Namespace;
use crate::names::{self, Form, Scope};

pub(super) fn read(object: &core::Namespace, diagnostics: &mut Diagnostics) -> Option<Namespace> {
    names::check(&object.metadata, Scope::Cluster(Form::Label), diagnostics);
    let namespace = Namespace {
        name: object.metadata.name.as_deref()?.into(),
        mode: values::dataplane_mode(&object.metadata, diagnostics).unwrap_or_default(),
        distribution: values::distribution_annotation(&object.metadata, diagnostics),
        labels: Arc::new(object.metadata.labels.clone().unwrap_or_default()),
    };
    (!diagnostics.is_fatal()).then_some(namespace)
}
