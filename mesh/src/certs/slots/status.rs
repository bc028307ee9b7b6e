//! How identities stand, for whoever asks.

use std::sync::Arc;
use std::time::SystemTime;

use spiffe::SpiffeId;

use crate::certs::{Certificate, IssueError};

/// How an identity stands.
#[derive(Clone, Debug)]
pub struct IdentityStatus {
    /// Who.
    pub identity: SpiffeId,
    /// How.
    pub state: IdentityState,
    /// Its certificate, also while renewing it fails.
    pub certificate: Option<Arc<Certificate>>,
    /// Why the last attempt failed, if it did.
    pub last_error: Option<IssueError>,
}

/// What waits for an identity's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A pod that is being enrolled.
    Pod,
    /// A connection.
    Connection,
}

/// Whether an identity can be proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdentityState {
    /// Nothing was issued yet, and nothing has failed.
    Initializing,
    /// It has a certificate that is valid.
    Available,
    /// IssueFuture failed, and nothing was issued before.
    Unavailable,
    /// Its certificate has expired, and no other came.
    Expired {
        /// When it was valid until.
        at: SystemTime,
    },
}
