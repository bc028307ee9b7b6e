//! Is a text the address of a CA?

use std::fmt;

use http::uri::Authority;

/// The host and port of a CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address(Authority);

impl Address {
    /// Parses `host:port` or `[ipv6]:port`, with or without `https://`. Other schemes are refused:
    /// without TLS, the CA cannot be authenticated.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let bare = text.strip_prefix("https://").unwrap_or(text);
        let bare = bare.strip_suffix('/').unwrap_or(bare);
        let authority: Authority = bare.parse().ok()?;
        let address = Self(authority);
        let is_host_char = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
        let host = address.host();
        let is_valid = !host.is_empty()
            && host.chars().all(is_host_char)
            && !bare.contains('@')
            && address.0.port_u16().is_some_and(|port| port != 0);
        is_valid.then_some(address)
    }

    /// The host, an IPv6 address without brackets.
    pub(super) fn host(&self) -> &str {
        let host = self.0.host();
        host.strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_host_and_port_with_optional_https() {
        for (text, shown) in [
            ("ca.example:15012", "ca.example:15012"),
            (
                "https://istiod.istio-system.svc:15012",
                "istiod.istio-system.svc:15012",
            ),
            ("https://10.0.0.1:15012/", "10.0.0.1:15012"),
            ("my_host:1", "my_host:1"),
            ("[fd00::1]:15012", "[fd00::1]:15012"),
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), shown);
        }
        assert_eq!(Address::parse("[fd00::1]:15012").unwrap().host(), "fd00::1");
    }

    #[test]
    fn anything_else_is_not_an_address() {
        for text in [
            "",
            "ca",
            "ca:",
            ":15012",
            "ca:0",
            "ca:70000",
            "fd00::1:15012",
            "[fd00::1]",
            "http://ca:15012",
            "ca:15012/path",
            "ca:15012?query",
            "user@ca:15012",
            "a b:15012",
            "a%20b:15012",
        ] {
            assert_eq!(Address::parse(text), None, "{text}");
        }
    }
}
