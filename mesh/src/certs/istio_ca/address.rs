//! Where an authority is.

use std::fmt;

use super::IstioCaError;

/// Host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    host: String,
    port: u16,
}

impl Address {
    /// `host:port` or `[v6]:port`, with `https://` or without. There is no other scheme: without TLS
    /// anybody could answer.
    pub(super) fn parse(text: &str) -> Result<Self, IstioCaError> {
        let error = || IstioCaError::Address {
            address: text.to_owned(),
        };
        let bare = text.strip_prefix("https://").unwrap_or(text);
        let bare = bare.strip_suffix('/').unwrap_or(bare);
        let (host, port) = bare.rsplit_once(':').ok_or_else(error)?;
        let port = port.parse().ok().filter(|port| *port != 0);
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(v6) => v6,
            None if host.contains(':') => return Err(error()),
            None => host,
        };
        let usable = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
        if host.is_empty() || !host.chars().all(usable) {
            return Err(error());
        }
        Ok(Self {
            host: host.to_owned(),
            port: port.ok_or_else(error)?,
        })
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port_and_tls_goes_without_saying() {
        for (text, shown) in [
            ("ca.example:15012", "ca.example:15012"),
            (
                "https://istiod.istio-system.svc:15012",
                "istiod.istio-system.svc:15012",
            ),
            ("https://10.0.0.1:15012/", "10.0.0.1:15012"),
            ("[fd00::1]:15012", "[fd00::1]:15012"),
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), shown);
        }
        for text in [
            "",
            "ca",
            "ca:",
            ":15012",
            "ca:0",
            "ca:70000",
            "fd00::1:15012",
            "http://ca:15012",
            "ca:15012/path",
            "a b:15012",
        ] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }
}
