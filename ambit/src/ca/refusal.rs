//! Why a request is refused.

use tonic::{Code, Status};

/// A refusal: the same code reaches the caller, the log and the metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Stable reason code.
    pub reason: &'static str,
    /// What gRPC calls it.
    pub code: Code,
    /// For the operator. Holds nothing secret: no token, no key, no request.
    pub message: String,
}

impl Refusal {
    /// A request that nobody may make like this.
    pub(super) fn invalid(reason: &'static str, message: impl Into<String>) -> Self {
        Self::new(reason, Code::InvalidArgument, message)
    }

    /// A request that this caller may not make.
    pub(super) fn denied(message: impl Into<String>) -> Self {
        Self::new("not_allowed", Code::PermissionDenied, message)
    }

    pub(super) fn new(reason: &'static str, code: Code, message: impl Into<String>) -> Self {
        Self {
            reason,
            code,
            message: message.into(),
        }
    }
}

impl From<&Refusal> for Status {
    fn from(refusal: &Refusal) -> Self {
        Self::new(
            refusal.code,
            format!("{}: {}", refusal.reason, refusal.message),
        )
    }
}
