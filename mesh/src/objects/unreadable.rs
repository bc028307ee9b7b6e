//! Policies in documents that are no YAML.
//!
//! A slip of the hand in a file usually meets a good version that goes on. A daemon that starts has
//! none, and a policy that it left out would no longer deny. So of a document that cannot be read,
//! but says somewhere that it is a policy, one is made that denies all that it may select: its
//! namespace, which is looked for in the text.

use serde_json::{Value, json};

use super::kind::policy;
use super::{Object, PolicyKind};

/// Stands where something else cannot be read, and is shown to the document's author.
const UNREADABLE: &str = "(the document cannot be read)";
/// The name of a policy of which not even that is known.
const UNNAMED: &str = "unreadable";

const KINDS: [(PolicyKind, &str); 3] = [
    (PolicyKind::Authorization, "security.istio.io/v1"),
    (PolicyKind::PeerAuthentication, "security.istio.io/v1"),
    (PolicyKind::Network, "networking.k8s.io/v1"),
];

/// The policy that a broken document seems to hold.
pub(super) fn unreadable_policy(text: &str) -> Option<Object> {
    let (kind, api_version) = KINDS
        .into_iter()
        .find(|(kind, _)| values(text, "kind").any(|value| value == kind.as_str()))?;
    // Another project's policy of the same name is not ours.
    if let Some(api_version) = values(text, "apiVersion").next()
        && PolicyKind::of(api_version, kind.as_str()).is_none()
    {
        return None;
    }
    let metadata = text.find("metadata").map_or("", |at| &text[at..]);
    let spec = match kind {
        PolicyKind::Authorization => json!({ "action": UNREADABLE }),
        PolicyKind::PeerAuthentication => json!({ "mtls": { "mode": UNREADABLE } }),
        PolicyKind::Network => json!({ "podSelector": UNREADABLE }),
    };
    let mut document = json!({
        "apiVersion": api_version,
        "kind": kind.as_str(),
        "metadata": { "name": values(metadata, "name").next().unwrap_or(UNNAMED) },
        "spec": spec,
    });
    if let Some(namespace) = values(metadata, "namespace").next() {
        document["metadata"]["namespace"] = Value::from(namespace);
    }
    policy(kind, document).ok()
}

/// What seems to be the values of a key, in YAML or JSON.
fn values<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    text.match_indices(key).filter_map(move |(at, _)| {
        let (before, after) = (&text[..at], &text[at + key.len()..]);
        let begins = |c: char| c.is_whitespace() || "{,\"'-".contains(c);
        if !before.chars().next_back().is_none_or(begins) {
            return None;
        }
        let after = after.trim_start_matches(['"', '\'']).trim_start();
        let after = after
            .strip_prefix(':')?
            .trim_start_matches([' ', '\t', '"', '\'']);
        let is_part = |c: char| c.is_ascii_alphanumeric() || "-./".contains(c);
        let end = after.find(|c| !is_part(c)).unwrap_or(after.len());
        (end > 0).then(|| &after[..end])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Option<String> {
        unreadable_policy(text).map(|object| object.reference().to_string())
    }

    #[test]
    fn kind_namespace_and_name_are_found_in_what_is_no_yaml() {
        let block = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  \
                     name: deny\n  namespace: shop\nspec: [\n";
        assert_eq!(
            found(block).as_deref(),
            Some("AuthorizationPolicy shop/deny")
        );
        let json =
            r#"{"kind": "NetworkPolicy", "metadata": {"namespace":"shop","name":"n"}, "spec""#;
        assert_eq!(found(json).as_deref(), Some("NetworkPolicy shop/n"));
        let flow = "{kind: 'PeerAuthentication', metadata: {name: p}";
        assert_eq!(found(flow).as_deref(), Some("PeerAuthentication default/p"));
        let half = "kind: AuthorizationPolicy\n\tmetadata";
        assert_eq!(
            found(half).as_deref(),
            Some("AuthorizationPolicy default/unreadable")
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
            assert_eq!(found(text), None, "{text}");
        }
    }
}
