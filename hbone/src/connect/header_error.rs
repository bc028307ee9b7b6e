//! Why a header is malformed.

/// A header value that violates its grammar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{header}: {problem}")]
pub struct HeaderError {
    /// Name of the header.
    pub header: &'static str,
    /// What is wrong with it. Never quotes the value, because an attacker may have chosen it.
    pub problem: &'static str,
}
