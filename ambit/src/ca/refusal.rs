//! Why a request is refused.

use tonic::{Code, Status};

/// A refusal. Its reason is the same for the caller, in the log and in the metrics.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Refusal {
    /// Stable reason code.
    pub reason: &'static str,
    /// The gRPC status code.
    pub code: Code,
    /// For the operator. Contains no token, no key and no request.
    pub message: String,
}

impl Refusal {
    /// A refusal with its reason code.
    pub fn new(reason: &'static str, code: Code, message: impl Into<String>) -> Self {
        Self {
            reason,
            code,
            message: message.into(),
        }
    }

    /// The caller did not prove who it is.
    pub fn unauthenticated(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(reason, Code::Unauthenticated, message)
    }

    /// The request is invalid for every caller.
    pub fn invalid(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(reason, Code::InvalidArgument, message)
    }
}

impl From<&Refusal> for Status {
    fn from(refusal: &Refusal) -> Self {
        Self::new(refusal.code, refusal.to_string())
    }
}
