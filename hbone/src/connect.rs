//! What the headers of an HBONE request and response contain, and how they are parsed and printed. No I/O, bounded work.
//!
//! The wire format is Istio's: `:authority` is the application's address behind the peer; `baggage` describes the sending
//! workload; `forwarded` contains the original client's address; `traceparent` is W3C trace context. Only the authority
//! affects decisions, so only it is required. The other headers are hints for telemetry: a malformed one is dropped, and
//! never fails a request.

mod authority;
mod baggage;
mod forwarded;
mod header_error;
mod traceparent;

pub use authority::Authority;
pub use baggage::Baggage;
pub use forwarded::Forwarded;
pub use header_error::HeaderError;
pub use traceparent::TraceParent;

/// The headers of a CONNECT request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectRequest {
    /// The application behind the peer.
    pub authority: Authority,
    /// The workload that connects.
    pub baggage: Option<Baggage>,
    /// The original client.
    pub forwarded: Option<Forwarded>,
    /// Trace context of this connection.
    pub traceparent: Option<TraceParent>,
}

impl ConnectRequest {
    /// A request without hints.
    pub fn new(authority: Authority) -> Self {
        Self {
            authority,
            baggage: None,
            forwarded: None,
            traceparent: None,
        }
    }
}

/// The headers of a 200 response.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectResponse {
    /// The workload that responds.
    pub baggage: Option<Baggage>,
}

#[cfg(test)]
mod tests;
