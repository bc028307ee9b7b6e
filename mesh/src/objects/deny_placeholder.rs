//! Fail-closed placeholders for policies that cannot be read.
//!
//! After a typing error in a file the last good version of the policy usually stays in use. A daemon
//! that has just started has none, and a policy that is left out no longer denies. So each policy
//! that cannot be read gets a placeholder that denies. If only the name is unusable, the rest of the
//! policy applies; if the selector is unknown, the placeholder denies the whole namespace. In a
//! document that is not YAML, kind, namespace and name are searched in the text.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::kind::{item_of_list, policy_kind};
use super::{Object, Policy, PolicyKind};
use crate::diagnostic::Diagnostic;
use crate::names;

/// The namespace of a policy that names none, as for kubectl.
const DEFAULT_NAMESPACE: &str = "default";

/// A policy whose name and namespace can be read; else its placeholder, with the error. `location`
/// makes the placeholder's name unique.
pub(super) fn read_policy(
    kind: PolicyKind,
    value: Value,
    location: &str,
) -> (Object, Option<Box<Diagnostic>>) {
    let object = |policy| Object::Policy(Arc::new(policy));
    let document = match namespace(value) {
        Ok(document) => document,
        Err(error) => {
            let policy = Policy::deny_all(kind, DEFAULT_NAMESPACE, &unnamed(location), &error);
            return (object(policy), Some(error));
        }
    };
    match name(&document) {
        Ok(()) => (object(Policy::new(kind, document)), None),
        Err(error) => {
            let policy = Policy::unnamed(kind, document, unnamed(location), &error);
            (object(policy), Some(error))
        }
    }
}

/// A name that no other policy can have.
fn unnamed(location: &str) -> String {
    format!("(unnamed, {location})")
}

/// The document, if its namespace can be read.
fn namespace(value: Value) -> Result<Map<String, Value>, Box<Diagnostic>> {
    let error = |field, message| Err(Box::new(Diagnostic::new(field, "bad_field", message)));
    let Value::Object(document) = value else {
        return error("", "is not an object");
    };
    let namespace = match document.get("metadata") {
        None | Some(Value::Null) => None,
        Some(Value::Object(metadata)) => metadata.get("namespace"),
        Some(_) => return error("metadata", "is not an object"),
    };
    match namespace {
        None | Some(Value::Null) => Ok(document),
        Some(Value::String(text)) if text.is_empty() || names::is_namespace(text) => Ok(document),
        Some(Value::String(text)) => {
            let message = format!("{text:?} is not a valid namespace name");
            let error = Diagnostic::new("metadata.namespace", "bad_name", message);
            Err(Box::new(error))
        }
        Some(_) => error("metadata.namespace", "is not a string"),
    }
}

fn name(document: &Map<String, Value>) -> Result<(), Box<Diagnostic>> {
    let metadata = document.get("metadata");
    let (code, message) = match metadata.and_then(|metadata| metadata.get("name")) {
        None | Some(Value::Null) => ("missing_field", "is missing".to_owned()),
        Some(Value::String(text)) if text.is_empty() => ("missing_field", "is empty".to_owned()),
        Some(Value::String(text)) if names::is_object_name(text) => return Ok(()),
        Some(Value::String(text)) => (
            "bad_name",
            format!("{text:?} is not a valid Kubernetes name"),
        ),
        Some(_) => ("bad_field", "is not a string".to_owned()),
    };
    Err(Box::new(Diagnostic::new("metadata.name", code, message)))
}

/// Placeholders for the policies that an unreadable document seems to hold. Each denies its
/// namespace.
pub(super) fn placeholders(text: &str, location: &str, reason: &Diagnostic) -> Vec<Object> {
    let (mut found, mut references) = (Vec::new(), BTreeSet::new());
    for scanned in ScannedPolicy::all(text) {
        let name = scanned
            .name
            .map_or_else(|| unnamed(location), str::to_owned);
        let namespace = scanned.namespace.unwrap_or(DEFAULT_NAMESPACE);
        let policy = Policy::deny_all(scanned.kind, namespace, &name, reason);
        let object = Object::Policy(Arc::new(policy));
        if references.insert(object.reference()) {
            found.push(object);
        }
    }
    found
}

/// Kind, namespace and name of a policy, found by searching a text that cannot be parsed.
struct ScannedPolicy<'a> {
    kind: PolicyKind,
    namespace: Option<&'a str>,
    name: Option<&'a str>,
}

impl<'a> ScannedPolicy<'a> {
    fn all(text: &'a str) -> Vec<Self> {
        let kinds: Vec<(usize, &str)> = values(text, "kind").collect();
        let mut found = Vec::new();
        for (i, (at, kind)) in kinds.iter().enumerate() {
            let before = i.checked_sub(1).map_or(0, |i| kinds[i].0);
            let end = kinds.get(i + 1).map_or(text.len(), |(next, _)| *next);
            let (head, tail) = (&text[before..*at], &text[*at..end]);
            // The nearest `apiVersion` belongs to the same object.
            let last = values(head, "apiVersion").last();
            let versions = last.map(|(from, v)| (head.len() - from, v));
            let versions = versions
                .into_iter()
                .chain(values(tail, "apiVersion").next());
            let version = versions.min_by_key(|(distance, _)| *distance);
            let version = version.map_or("", |(_, version)| version);
            let of = |kind| policy_kind(version, kind);
            if let Some(kind) = of(kind) {
                // All text before the only `kind` belongs to the same object.
                let head = if kinds.len() == 1 { text } else { head };
                found.push(
                    Self::new(kind, tail)
                        .or_else(|| Self::new(kind, head))
                        .unwrap_or(Self {
                            kind,
                            namespace: None,
                            name: None,
                        }),
                );
            } else if let Some(kind) = item_of_list(kind).and_then(of) {
                found.extend(Self::items(kind, tail));
            }
        }
        found
    }

    /// Searches namespace and name in the first `metadata` of a text.
    fn new(kind: PolicyKind, text: &'a str) -> Option<Self> {
        let at = keys(text, "metadata").next()?;
        let metadata = &text[at..];
        let end = keys(metadata, "spec").next();
        let metadata = &metadata[..end.unwrap_or(metadata.len())];
        let value = |key| values(metadata, key).map(|(_, value)| value).next();
        Some(Self {
            kind,
            namespace: value("namespace").filter(|namespace| names::is_namespace(namespace)),
            name: value("name").filter(|name| names::is_object_name(name)),
        })
    }

    /// The items of a list, which may omit their kind. At least one.
    fn items(kind: PolicyKind, text: &'a str) -> Vec<Self> {
        let starts: Vec<usize> = keys(text, "metadata").collect();
        let ends = starts.iter().skip(1).copied().chain([text.len()]);
        let items = starts.iter().zip(ends);
        let mut items: Vec<Self> = items
            .filter_map(|(start, end)| Self::new(kind, &text[*start..end]))
            // Skips the metadata of the list itself.
            .filter(|item| item.name.is_some() || item.namespace.is_some())
            .collect();
        if items.is_empty() {
            items.push(Self {
                kind,
                namespace: None,
                name: None,
            });
        }
        items
    }
}

/// Positions of what looks like a key, in YAML or JSON, each with the text after its colon.
fn entries<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    text.match_indices(key).filter_map(move |(at, _)| {
        let (before, after) = (&text[..at], &text[at + key.len()..]);
        let begins = |c: char| c.is_whitespace() || "{,\"'-".contains(c);
        if !before.chars().next_back().is_none_or(begins) {
            return None;
        }
        let after = after.trim_start_matches(['"', '\'']).trim_start();
        Some((at, after.strip_prefix(':')?))
    })
}

fn keys<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = usize> {
    entries(text, key).map(|(at, _)| at)
}

/// What looks like the values of a key, each with the position of the key.
fn values<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    entries(text, key).filter_map(|(at, after)| {
        let after = after.trim_start_matches([' ', '\t', '"', '\'']);
        let is_part = |c: char| c.is_ascii_alphanumeric() || "-./".contains(c);
        let end = after.find(|c| !is_part(c)).unwrap_or(after.len());
        (end > 0).then(|| (at, &after[..end]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<String> {
        let reason = Diagnostic::new("", "yaml_syntax", "not YAML");
        let policies = placeholders(text, "f.yaml#0", &reason);
        let names = policies.iter().map(|object| object.reference().to_string());
        names.collect()
    }

    #[test]
    fn kind_namespace_and_name_are_found_in_text_that_is_not_yaml() {
        let block = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  \
                     name: deny\n  namespace: shop\nspec: [\n";
        assert_eq!(found(block), ["AuthorizationPolicy shop/deny"]);
        let json =
            r#"{"kind": "NetworkPolicy", "metadata": {"namespace":"shop","name":"n"}, "spec""#;
        assert_eq!(found(json), ["NetworkPolicy shop/n"]);
        let flow = "{kind: 'PeerAuthentication', metadata: {name: p}";
        assert_eq!(found(flow), ["PeerAuthentication default/p"]);
        let half = "kind: authorizationpolicy\n\tmetadata";
        assert_eq!(
            found(half),
            ["AuthorizationPolicy default/(unnamed, f.yaml#0)"]
        );
        let last = "metadata: {name: p, namespace: shop}\nspec: {a: [}\nkind: NetworkPolicy";
        assert_eq!(found(last), ["NetworkPolicy shop/p"]);
        let elsewhere = "kind: NetworkPolicy\nmetadata: {name: p}\nspec: {namespace: x, [";
        assert_eq!(found(elsewhere), ["NetworkPolicy default/p"]);
    }

    #[test]
    fn each_policy_of_an_unparsable_document_is_found() {
        let list = "apiVersion: v1\nkind: List\nitems:\n\
                    - apiVersion: security.istio.io/v1\n  kind: AuthorizationPolicy\n  \
                    metadata: {name: a, namespace: shop}\n  spec: {}\n\
                    - apiVersion: v1\n  kind: Pod\n  metadata: {name: x, namespace: attic}\n\
                    - apiVersion: policy.linkerd.io/v1\n  kind: AuthorizationPolicy\n  \
                    metadata: {name: l, namespace: attic}\n\
                    - apiVersion: networking.k8s.io/v1\n  kind: NetworkPolicy\n  \
                    metadata: {name: b, namespace: bank}\n  spec: [";
        assert_eq!(
            found(list),
            ["AuthorizationPolicy shop/a", "NetworkPolicy bank/b"]
        );
        let list = r#"{"kind":"PeerAuthenticationList","metadata":{"resourceVersion":""},"items":[
            {"metadata":{"name":"a","namespace":"shop"},"spec":{}},
            {"metadata":{"name":"b","namespace":"bank"},"spec":"#;
        assert_eq!(
            found(list),
            ["PeerAuthentication shop/a", "PeerAuthentication bank/b"]
        );
        assert_eq!(
            found("kind: NetworkPolicyList\n["),
            ["NetworkPolicy default/(unnamed, f.yaml#0)"]
        );
    }

    #[test]
    fn other_kinds_get_no_placeholder() {
        for text in [
            "kind: [Service\n",
            "kind: Service\nmetadata: {name: AuthorizationPolicy",
            "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nspec: [",
            "xkind: NetworkPolicy\n[",
            "",
        ] {
            assert!(found(text).is_empty(), "{text}");
        }
    }
}
