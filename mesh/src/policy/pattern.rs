//! String patterns of AuthorizationPolicies: exact, prefix, suffix or presence.

use serde::Serialize;

/// `shop`, `shop-*`, `*-shop` or `*`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Pattern {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    /// Any string that is not empty. A list without items, as in the config dump of Istio's ztunnel.
    Presence([(); 0]),
}

impl Pattern {
    /// Parses a pattern. Istio reads a star elsewhere than at one end literally, so it would never
    /// match; it is rejected.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let pattern = match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(""), _) => Pattern::Presence([]),
            (Some(suffix), _) => Pattern::Suffix(suffix.into()),
            (None, Some(prefix)) => Pattern::Prefix(prefix.into()),
            (None, None) => Pattern::Exact(text.into()),
        };
        match pattern.literal() {
            "" if text.is_empty() => Err("is empty".to_owned()),
            literal if literal.contains('*') => {
                Err(format!("{text:?}: a star is allowed at one end only"))
            }
            _ => Ok(pattern),
        }
    }

    /// The pattern without its star.
    pub(super) fn literal(&self) -> &str {
        match self {
            Pattern::Exact(text) | Pattern::Prefix(text) | Pattern::Suffix(text) => text,
            Pattern::Presence([]) => "",
        }
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        self.matches_joined(text, "")
    }

    /// Whether it matches the concatenation of `head` and `tail`, without building it.
    pub(super) fn matches_joined(&self, head: &str, tail: &str) -> bool {
        let (head, tail) = (head.as_bytes(), tail.as_bytes());
        match self {
            Pattern::Exact(text) => text
                .as_bytes()
                .strip_prefix(head)
                .is_some_and(|rest| rest == tail),
            Pattern::Prefix(text) => match text.as_bytes().strip_prefix(head) {
                Some(rest) => tail.starts_with(rest),
                None => head.starts_with(text.as_bytes()),
            },
            Pattern::Suffix(text) => match text.as_bytes().strip_suffix(tail) {
                Some(rest) => head.ends_with(rest),
                None => tail.ends_with(text.as_bytes()),
            },
            Pattern::Presence([]) => !head.is_empty() || !tail.is_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_text_matches_as_the_concatenation() {
        let texts = ["", "a", "ab", "abc", "abcab", "cluster.local/ns/a/sa/b"];
        let patterns = [
            "a",
            "ab",
            "abcab",
            "a*",
            "ab*",
            "abc*",
            "*b",
            "*ab",
            "*cab",
            "*abcab",
            "x*",
            "*x",
            "*",
            "cluster.local/ns/*",
            "*/sa/b",
            "cluster.local/ns/a/sa/b",
            "c*",
            "*abcabc",
            "abcabc*",
        ];
        for text in texts {
            for pattern in patterns {
                let expected = match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
                    (Some(""), _) => !text.is_empty(),
                    (Some(suffix), _) => text.ends_with(suffix),
                    (_, Some(prefix)) => text.starts_with(prefix),
                    _ => text == pattern,
                };
                let parsed = Pattern::parse(pattern).unwrap();
                for at in 0..=text.len() {
                    let (head, tail) = text.split_at(at);
                    let found = parsed.matches_joined(head, tail);
                    assert_eq!(found, expected, "{pattern} on {head}|{tail}");
                }
            }
        }
    }

    #[test]
    fn star_is_allowed_at_one_end_only() {
        for bad in ["", "**", "a*b", "*a*", "*a*b", "a**"] {
            assert!(Pattern::parse(bad).is_err(), "{bad}");
        }
    }
}
