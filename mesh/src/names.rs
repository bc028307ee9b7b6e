//! Kubernetes name rules (RFC 1123), checked again because names become parts of identities.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::diagnostic::Diagnostics;

/// The two forms of names (RFC 1123, as Kubernetes reads it).
#[derive(Clone, Copy)]
pub(crate) enum Form {
    /// Lower-case letters, digits and inner dashes; at most 63.
    Label,
    /// Labels with dots between them; at most 253.
    Subdomain,
}

/// Whether a kind is namespaced, and the form of its names.
#[derive(Clone, Copy)]
pub(crate) enum Scope {
    Cluster(Form),
    Namespaced(Form),
}

impl Form {
    pub(crate) fn admits(self, name: &str) -> bool {
        match self {
            Form::Label => is_label(name),
            Form::Subdomain => name.len() <= 253 && name.split('.').all(is_label),
        }
    }
}

fn is_label(name: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|&b| alphanumeric(b) || b == b'-')
        && alphanumeric(bytes[0])
        && alphanumeric(bytes[bytes.len() - 1])
}

/// Whether this is a valid namespace name.
pub(crate) fn is_namespace(name: &str) -> bool {
    Form::Label.admits(name)
}

/// Whether this is a valid name for most kinds of objects.
pub(crate) fn is_object_name(name: &str) -> bool {
    Form::Subdomain.admits(name)
}

/// A uid becomes part of keys and file names, so it may hold no character with a meaning there.
pub(crate) fn is_uid(uid: &str) -> bool {
    (1..=128).contains(&uid.len()) && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Checks namespace and name. An invalid name is fatal: the identity of the object is not certain.
pub(crate) fn check(meta: &ObjectMeta, scope: Scope, diagnostics: &mut Diagnostics) {
    let (Scope::Cluster(form) | Scope::Namespaced(form)) = scope;
    let name = meta.name.as_deref().unwrap_or_default();
    if !form.admits(name) {
        diagnostics.fatal(
            "metadata.name",
            "bad_name",
            format!("{name:?} is not a valid Kubernetes name"),
        );
    }
    if matches!(scope, Scope::Namespaced(_)) && !Form::Label.admits(namespace_of(meta)) {
        let namespace = namespace_of(meta);
        let message = format!("{namespace:?} is not a valid namespace name");
        diagnostics.fatal("metadata.namespace", "bad_name", message);
    }
}

/// The namespace of a namespaced object.
pub(crate) fn namespace_of(meta: &ObjectMeta) -> &str {
    match meta.namespace.as_deref() {
        None | Some("") => "default",
        Some(namespace) => namespace,
    }
}
