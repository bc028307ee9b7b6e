//! Which reason code does a failed call get, and is its connection still good?

use std::error::Error;

use tonic::{Code, Status};

use super::address::Address;
use crate::certs::grpc_status::error_chain;
use crate::certs::source::{IssueError, IssueFailure};

/// Longest text of the CA's error that is logged.
const MAX_MESSAGE_CHARS: usize = 300;

/// The CA responded, but could not issue.
const FAILED: &str = "ca_failed";

pub(super) fn failure(status: &Status, address: &Address) -> IssueFailure {
    let error = error_chain(status, MAX_MESSAGE_CHARS);
    // tonic attaches a cause to a status that it creates itself, for a broken connection.
    let is_local = status.source().is_some();
    let (code, message) = match status.code() {
        Code::Internal | Code::Unknown if is_local => (
            IssueError::UNREACHABLE,
            format!("the connection to {address} broke: {error}"),
        ),
        Code::Unavailable | Code::Cancelled => (
            IssueError::UNREACHABLE,
            format!("cannot reach {address}: {error}"),
        ),
        Code::DeadlineExceeded => (
            IssueError::TIMEOUT,
            format!("{address} exceeded its deadline: {error}"),
        ),
        Code::OutOfRange => (
            IssueFailure::MALFORMED,
            format!("the response of {address} is too large: {error}"),
        ),
        Code::Unauthenticated
        | Code::PermissionDenied
        | Code::InvalidArgument
        | Code::FailedPrecondition => (
            IssueError::DENIED,
            format!("{address} refused the request: {error}"),
        ),
        code => (FAILED, format!("{address} failed with {code:?}: {error}")),
    };
    IssueFailure::new(code, message)
}

/// Whether the next call needs a new connection. Not after the CA has refused the request.
pub(super) fn is_connection_suspect(status: &Status) -> bool {
    !matches!(
        status.code(),
        Code::Unauthenticated
            | Code::PermissionDenied
            | Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::ResourceExhausted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_refusal_keeps_the_connection() {
        assert!(is_connection_suspect(&Status::unavailable("")));
        assert!(is_connection_suspect(&Status::unknown("")));
        assert!(!is_connection_suspect(&Status::permission_denied("")));
    }
}
