//! What the kinds of policies have in common, from the document.

use std::sync::Arc;

use serde_json::Value;
use spiffe::TrustDomain;

use super::aliases::TrustDomains;
use super::authorization::{self, Authorization};
use super::document::{Field, Reader};
use super::labels;
use super::network::{self, NetworkPolicy};
use super::peer::{self, PeerAuthentication};
use super::report::PolicyScope;
use super::selector::Selector;
use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::names::namespace_of;
use crate::objects::{Policy, PolicyKind};
use crate::params::Params;

/// What a policy's meaning depends on beside the policy.
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

/// A policy that has been read by itself, with what is to be said of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ReadPolicy {
    pub(crate) diagnostics: Vec<Diagnostic>,
    pub(super) body: Body,
    pub(super) reach: Reach,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Body {
    Authorization(Arc<Authorization>),
    Peer(Arc<PeerAuthentication>),
    Network(Arc<NetworkPolicy>),
}

/// For which workloads a policy holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reach {
    pub(super) scope: PolicyScope,
    pub(super) namespace: Arc<str>,
    /// It is in the root namespace: its selector is asked of the pods of all namespaces.
    pub(super) in_root: bool,
    /// Empty unless the scope is that of a selector.
    pub(super) selector: Selector,
}

impl ReadPolicy {
    pub(crate) fn new(policy: &Policy, context: &Context) -> Self {
        let mut diagnostics = Diagnostics::default();
        if policy.kind == PolicyKind::Network {
            return Self::network(policy, diagnostics);
        }
        let mut reader = Reader::new(&mut diagnostics);
        let (body, reach) = match policy.kind {
            PolicyKind::PeerAuthentication => {
                let (peer, reach) = peer::read(policy, context, &mut reader);
                (Body::Peer(Arc::new(peer)), reach)
            }
            _ => {
                let (authorization, reach) = authorization::read(policy, context, &mut reader);
                (Body::Authorization(Arc::new(authorization)), reach)
            }
        };
        Self {
            diagnostics: diagnostics.into_vec(),
            body,
            reach,
        }
    }

    fn network(policy: &Policy, mut diagnostics: Diagnostics) -> Self {
        let network = network::read(policy, &mut diagnostics);
        let scope = match network.selects_all() {
            true => PolicyScope::Namespace,
            false => PolicyScope::WorkloadSelector,
        };
        Self {
            diagnostics: diagnostics.into_vec(),
            body: Body::Network(Arc::new(network)),
            reach: Reach {
                scope,
                namespace: namespace_of(&policy.metadata).into(),
                in_root: false,
                selector: Selector::default(),
            },
        }
    }

    /// Part of it could not be understood.
    pub(super) fn is_invalid(&self) -> bool {
        self.diagnostics.iter().any(|fault| !fault.is_note())
    }
}

/// The fields of every document.
pub(super) const DOCUMENT: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];

/// `AuthorizationPolicy shop/web`: how a denial names the policy.
pub(super) fn name(policy: &Policy) -> String {
    let name = policy.metadata.name.as_deref().unwrap_or_default();
    let namespace = namespace_of(&policy.metadata);
    format!("{} {namespace}/{name}", policy.kind.as_str())
}

/// Checks what is around the spec; false if the version is none of these, or the kind has another
/// spelling, so that its fields may mean something else.
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
    let is_spelt = kind == Some(policy.kind.as_str());
    if !is_spelt {
        let message = format!("is not spelt {}; taken as one", policy.kind.as_str());
        reader.error("kind", "bad_kind", message);
    }
    let version = policy.document.get("apiVersion").and_then(Value::as_str);
    let known = version.is_some_and(|version| versions.contains(&version));
    if !known {
        let message = format!("is none of {}", versions.join(" and "));
        reader.error("apiVersion", "unknown_version", message);
    }
    known && is_spelt
}

/// A spec may be left out, but it cannot be something else than an object.
pub(super) fn expect_object(spec: &Field<'_>, policy: &Policy, reader: &mut Reader<'_>) {
    if spec.value.is_null() && policy.document.contains_key("spec") {
        spec.error("bad_field", "is empty".to_owned(), reader);
    }
}

/// A selector that cannot be read selects everything that it could.
pub(super) fn reach(
    policy: &Policy,
    spec: &Field<'_>,
    context: &Context,
    reader: &mut Reader<'_>,
) -> Reach {
    let namespace: Arc<str> = namespace_of(&policy.metadata).into();
    let in_root = *namespace == *context.root_namespace;
    let selector = match spec.value.get("selector") {
        None => Selector::default(),
        Some(_) => selector(&spec.get_or_null("selector"), reader).unwrap_or_default(),
    };
    let scope = match (selector.0.is_empty(), in_root) {
        (false, _) => PolicyScope::WorkloadSelector,
        (true, true) => PolicyScope::Global,
        (true, false) => PolicyScope::Namespace,
    };
    Reach {
        scope,
        namespace,
        in_root,
        selector,
    }
}

/// Istio's selectors have `matchLabels` only.
fn selector(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Selector> {
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
    labels::selector(field, reader)
}
