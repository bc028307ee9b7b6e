//! The head of an HBONE request and response: parsing and printing, pure and bounded.
//!
//! The wire form is Istio's: `:authority` names the application behind the peer; `baggage` describes the workload that
//! speaks; `forwarded` carries the original client's address; `traceparent` is W3C trace context. Only the authority
//! decides anything, so only it is required. The others are hints for telemetry: a malformed one is dropped, and never
//! fails a request.

mod authority;
mod baggage;
mod forwarded;
mod traceparent;

pub use authority::Authority;
pub use baggage::Baggage;
pub use forwarded::Forwarded;
pub use traceparent::TraceParent;

/// A header value that is not what its grammar allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{header}: {problem}")]
pub struct HeaderError {
    /// The header.
    pub header: &'static str,
    /// What is wrong with it. Never quotes the value, which an attacker chose.
    pub problem: &'static str,
}

/// The head of a CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    /// What to connect to behind the peer.
    pub authority: Authority,
    /// The workload that connects.
    pub baggage: Option<Baggage>,
    /// The original client.
    pub forwarded: Option<Forwarded>,
    /// Trace context of this connection.
    pub traceparent: Option<TraceParent>,
}

impl ConnectRequest {
    /// A request without any hints.
    pub fn new(authority: Authority) -> Self {
        Self {
            authority,
            baggage: None,
            forwarded: None,
            traceparent: None,
        }
    }
}

/// The head of a 200.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectResponse {
    /// The workload that answers.
    pub baggage: Option<Baggage>,
}

#[cfg(test)]
mod tests;
