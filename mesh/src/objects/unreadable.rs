//! Policies that cannot be read, and what stands for them.
//!
//! A slip of the hand in a file usually meets a good version that goes on. A daemon that starts has
//! none, and a policy that it left out would no longer deny. So for each that cannot be read one is
//! made that denies. If only its name is unfit, all else of it holds; if it cannot be told where it
//! holds, all of its namespace is denied. Of a document that is no YAML kind, namespace and name
//! are looked for in the text.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::kind::{BadField, item_of_list};
use super::{Object, Policy, PolicyKind};
use crate::compile::names;

/// Where a policy without a readable namespace is taken to be, as for kubectl.
const DEFAULT: &str = "default";

/// A policy whose name and namespace can be read; else what stands for it, and why. `place` tells
/// it from the others that have no name.
pub(super) fn read_policy(
    kind: PolicyKind,
    value: Value,
    place: &str,
) -> Result<Object, (Object, BadField)> {
    let object = |policy| Object::Policy(Arc::new(policy));
    let document = match namespace(value) {
        Ok(document) => document,
        Err(bad) => {
            let policy = Policy::deny_all(kind, DEFAULT, &unnamed(place), &bad);
            return Err((object(policy), bad));
        }
    };
    match name(&document) {
        Ok(()) => Ok(object(Policy::new(kind, document))),
        Err(bad) => {
            let policy = Policy::unnamed(kind, document, unnamed(place), &bad);
            Err((object(policy), bad))
        }
    }
}

/// No other policy can be called like this.
fn unnamed(place: &str) -> String {
    format!("(unnamed, {place})")
}

/// The document, if it says in which namespace it is.
fn namespace(value: Value) -> Result<Map<String, Value>, BadField> {
    let bad = |field: &str, message: String| BadField {
        field: field.to_owned(),
        code: "bad_field",
        message,
    };
    let Value::Object(document) = value else {
        return Err(bad("", "is no object".to_owned()));
    };
    let namespace = match document.get("metadata") {
        None | Some(Value::Null) => None,
        Some(Value::Object(metadata)) => metadata.get("namespace"),
        Some(_) => return Err(bad("metadata", "is no object".to_owned())),
    };
    match namespace {
        None | Some(Value::Null) => Ok(document),
        Some(Value::String(text)) if text.is_empty() || names::is_namespace(text) => Ok(document),
        Some(Value::String(text)) => Err(BadField {
            field: "metadata.namespace".to_owned(),
            code: "bad_name",
            message: format!("{text:?} is no namespace name"),
        }),
        Some(_) => Err(bad("metadata.namespace", "is not a text".to_owned())),
    }
}

fn name(document: &Map<String, Value>) -> Result<(), BadField> {
    let metadata = document.get("metadata");
    let (code, message) = match metadata.and_then(|metadata| metadata.get("name")) {
        None | Some(Value::Null) => ("missing_field", "is missing".to_owned()),
        Some(Value::String(text)) if text.is_empty() => ("missing_field", "is empty".to_owned()),
        Some(Value::String(text)) if names::is_object_name(text) => return Ok(()),
        Some(Value::String(text)) => ("bad_name", format!("{text:?} is no Kubernetes name")),
        Some(_) => ("bad_field", "is not a text".to_owned()),
    };
    Err(BadField {
        field: "metadata.name".to_owned(),
        code,
        message,
    })
}

/// What stands for the policies that a broken document seems to hold: for each that can be told
/// one that denies its namespace.
pub(super) fn unreadable_policies(text: &str, place: &str, reason: &BadField) -> Vec<Object> {
    let (mut found, mut references) = (Vec::new(), BTreeSet::new());
    for seen in Seen::all(text) {
        let name = seen.name.map_or_else(|| unnamed(place), str::to_owned);
        let namespace = seen.namespace.unwrap_or(DEFAULT);
        let policy = Policy::deny_all(seen.kind, namespace, &name, reason);
        let object = Object::Policy(Arc::new(policy));
        if references.insert(object.reference()) {
            found.push(object);
        }
    }
    found
}

/// What can be seen of a policy in a text.
struct Seen<'a> {
    kind: PolicyKind,
    namespace: Option<&'a str>,
    name: Option<&'a str>,
}

impl<'a> Seen<'a> {
    fn all(text: &'a str) -> Vec<Self> {
        let kinds: Vec<(usize, &str)> = values(text, "kind").collect();
        let mut found = Vec::new();
        for (i, (at, kind)) in kinds.iter().enumerate() {
            let before = i.checked_sub(1).map_or(0, |i| kinds[i].0);
            let end = kinds.get(i + 1).map_or(text.len(), |(next, _)| *next);
            let (head, tail) = (&text[before..*at], &text[*at..end]);
            // The one that stands nearest is of the same object.
            let last = values(head, "apiVersion").last();
            let versions = last.map(|(from, v)| (head.len() - from, v));
            let versions = versions
                .into_iter()
                .chain(values(tail, "apiVersion").next());
            let version = versions.min_by_key(|(distance, _)| *distance);
            let version = version.map_or("", |(_, version)| version);
            let of = |kind| PolicyKind::of(version, kind);
            if let Some(kind) = of(kind) {
                // What stands before the only kind is the same object's.
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

    /// By the first `metadata` of a text.
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

    /// The items of a list need not say what they are. There is at least one.
    fn items(kind: PolicyKind, text: &'a str) -> Vec<Self> {
        let starts: Vec<usize> = keys(text, "metadata").collect();
        let ends = starts.iter().skip(1).copied().chain([text.len()]);
        let items = starts.iter().zip(ends);
        let mut items: Vec<Self> = items
            .filter_map(|(start, end)| Self::new(kind, &text[*start..end]))
            // That of the list itself.
            .filter(|seen| seen.name.is_some() || seen.namespace.is_some())
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

/// Where a key seems to stand, in YAML or JSON, and what follows its colon.
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

/// What seems to be the values of a key, and where it stands.
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
        let reason = BadField {
            field: String::new(),
            code: "yaml_syntax",
            message: "no YAML".to_owned(),
        };
        let policies = unreadable_policies(text, "f.yaml#0", &reason);
        let names = policies.iter().map(|object| object.reference().to_string());
        names.collect()
    }

    #[test]
    fn kind_namespace_and_name_are_found_in_what_is_no_yaml() {
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
    fn each_policy_of_a_broken_document_is_found() {
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
    fn what_is_no_policy_of_ours_is_none() {
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
