//! Parses what all kinds of policies have in common: envelope, selector and scope.

use std::sync::Arc;

use serde_json::Value;
use spiffe::TrustDomain;

use super::authorization::{self, Authorization};
use super::document::{Field, Reader};
use super::network::{self, NetworkPolicy};
use super::object::{Policy, PolicyKind};
use super::peer_authentication::{self, PeerAuthentication};
use super::report::PolicyScope;
use super::selector::{self, Selector};
use super::trust_domains::TrustDomains;
use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::names::namespace_of;
use crate::params::Params;

/// The settings that the meaning of a policy depends on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Context {
    pub(super) root_namespace: Arc<str>,
    pub(super) trust_domains: TrustDomains,
}

impl Context {
    pub(crate) fn new(params: &Params) -> Arc<Self> {
        let (own, aliases): (&TrustDomain, &[TrustDomain]) =
            (&params.trust_domain, &params.trust_domain_aliases);
        Arc::new(Self {
            root_namespace: params.root_namespace.clone(),
            trust_domains: TrustDomains::new(own, aliases),
        })
    }
}

/// A policy that is parsed by itself, with its diagnostics.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ParsedPolicy {
    pub(crate) diagnostics: Vec<Diagnostic>,
    pub(super) body: Body,
    pub(super) scope: Scope,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body {
    Authorization(Arc<Authorization>),
    Peer(Arc<PeerAuthentication>),
    Network(Arc<NetworkPolicy>),
}

/// The workloads that a policy applies to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Scope {
    pub(super) kind: PolicyScope,
    pub(super) namespace: Arc<str>,
    /// The policy is in the root namespace: its selector matches pods of all namespaces.
    pub(super) is_in_root: bool,
    /// Empty unless the kind is [`PolicyScope::WorkloadSelector`].
    pub(super) selector: Selector,
}

impl ParsedPolicy {
    pub(crate) fn new(policy: &Policy, context: &Context) -> Self {
        let mut diagnostics = Diagnostics::default();
        if policy.kind == PolicyKind::Network {
            return Self::network(policy, diagnostics);
        }
        let mut reader = Reader::new(&mut diagnostics);
        let (body, scope) = match policy.kind {
            PolicyKind::PeerAuthentication => {
                let (peer, scope) = peer_authentication::read(policy, context, &mut reader);
                (Body::Peer(Arc::new(peer)), scope)
            }
            _ => {
                let (authorization, scope) = authorization::read(policy, context, &mut reader);
                (Body::Authorization(Arc::new(authorization)), scope)
            }
        };
        Self {
            diagnostics: diagnostics.into_vec(),
            body,
            scope,
        }
    }

    fn network(policy: &Policy, mut diagnostics: Diagnostics) -> Self {
        let network = network::read(policy, &mut diagnostics);
        let kind = match network.selects_all() {
            true => PolicyScope::Namespace,
            false => PolicyScope::WorkloadSelector,
        };
        Self {
            diagnostics: diagnostics.into_vec(),
            body: Body::Network(Arc::new(network)),
            scope: Scope {
                kind,
                namespace: namespace_of(&policy.metadata).into(),
                is_in_root: false,
                selector: Selector::default(),
            },
        }
    }

    /// Whether part of it cannot be understood.
    pub(super) fn is_invalid(&self) -> bool {
        self.diagnostics.iter().any(|d| !d.is_note())
    }
}

/// The top-level fields of every document.
pub(super) const DOCUMENT: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];

/// The name of a policy in a denial: `AuthorizationPolicy shop/web`.
pub(super) fn name(policy: &Policy) -> String {
    let name = policy.metadata.name.as_deref().unwrap_or_default();
    let namespace = namespace_of(&policy.metadata);
    format!("{} {namespace}/{name}", policy.kind.as_str())
}

/// Checks everything around the spec. False if the version is none of these or the kind is misspelt,
/// so that the fields may mean something else.
pub(super) fn envelope(policy: &Policy, versions: &[&str], reader: &mut Reader<'_>) -> bool {
    for key in policy.document.keys() {
        if !DOCUMENT.contains(&key.as_str()) {
            reader.unknown_field(key.clone());
        }
    }
    for error in policy.diagnostics() {
        reader.error(&*error.field, error.code, error.message.clone());
    }
    let kind = policy.document.get("kind").and_then(Value::as_str);
    let is_exact = kind == Some(policy.kind.as_str());
    if !is_exact {
        let message = format!("is misspelt; read as {}", policy.kind.as_str());
        reader.error("kind", "bad_kind", message);
    }
    let version = policy.document.get("apiVersion").and_then(Value::as_str);
    let known = version.is_some_and(|version| versions.contains(&version));
    if !known {
        let message = format!("is not one of {}", versions.join(" and "));
        reader.error("apiVersion", "unknown_version", message);
    }
    known && is_exact
}

/// Reports a spec that is present and null. A missing spec is allowed.
pub(super) fn expect_object(spec: &Field<'_>, policy: &Policy, reader: &mut Reader<'_>) {
    if spec.value.is_null() && policy.document.contains_key("spec") {
        spec.error("bad_field", "is empty".to_owned(), reader);
    }
}

/// Reads the scope. An invalid selector selects everything that a selector could.
pub(super) fn scope(
    policy: &Policy,
    spec: &Field<'_>,
    context: &Context,
    reader: &mut Reader<'_>,
) -> Scope {
    let namespace: Arc<str> = namespace_of(&policy.metadata).into();
    let is_in_root = *namespace == *context.root_namespace;
    let selector = match spec.value.get("selector") {
        None => Selector::default(),
        Some(_) => istio_selector(&spec.get_or_null("selector"), reader).unwrap_or_default(),
    };
    let kind = match (selector.0.is_empty(), is_in_root) {
        (false, _) => PolicyScope::WorkloadSelector,
        (true, true) => PolicyScope::Global,
        (true, false) => PolicyScope::Namespace,
    };
    Scope {
        kind,
        namespace,
        is_in_root,
        selector,
    }
}

/// Istio's selectors have `matchLabels` only.
fn istio_selector(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Selector> {
    if !field.value.is_object() {
        field.error("bad_field", "is not an object".to_owned(), reader);
        return None;
    }
    let before = reader.count();
    field.expect_keys(&["matchLabels"], reader);
    if field.value.get("matchLabels").is_some_and(Value::is_null) {
        let labels = field.get_or_null("matchLabels");
        labels.error("bad_field", "is empty".to_owned(), reader);
    }
    if reader.count() > before {
        return None;
    }
    selector::parse(field, reader)
}
