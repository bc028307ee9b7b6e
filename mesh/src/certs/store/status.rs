//! What do the users of certificates see of each identity?

use std::sync::Arc;
use std::time::SystemTime;

use spiffe::SpiffeId;

use crate::certs::certificate::Certificate;
use crate::certs::source::IssueError;

/// The status of one identity.
#[derive(Clone, Debug)]
pub struct IdentityStatus {
    /// The identity.
    pub identity: SpiffeId,
    /// Whether it has a certificate.
    pub state: IdentityState,
    /// Its certificate, which stays here while renewals fail.
    pub certificate: Option<Arc<Certificate>>,
    /// Why the last request failed, if it did.
    pub last_error: Option<IssueError>,
}

/// What waits for an identity's certificate. The greater value is the more urgent one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A pod that is being enrolled.
    Pod,
    /// A connection.
    Connection,
}

/// Whether an identity has a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdentityState {
    /// No certificate yet, and no request has failed.
    Initializing,
    /// A valid certificate.
    Available,
    /// No certificate yet, and the last request failed.
    Unavailable,
    /// The certificate has expired and was not replaced.
    Expired {
        /// End of its validity.
        at: SystemTime,
    },
}
