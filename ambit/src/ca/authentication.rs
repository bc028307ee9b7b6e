//! Who is the caller?

use std::pin::Pin;

use super::refusal::Refusal;
use super::service_account::{ServiceAccount, ServiceAccountPatterns};

/// Authenticates the sender of a request. Today by signed tokens; asynchronous, so that Kubernetes'
/// TokenReview fits too.
pub trait Authenticator: Send + Sync {
    /// The caller that presents this bearer token; `None` if the request has no token.
    ///
    /// # Errors
    /// Fails with [`Refusal::unauthenticated`] if the token does not identify a caller.
    fn authenticate<'a>(&'a self, token: Option<&'a str>) -> Authenticating<'a>;
}

/// The future of [`Authenticator::authenticate`].
pub type Authenticating<'a> = Pin<Box<dyn Future<Output = Result<Caller, Refusal>> + Send + 'a>>;

/// An authenticated caller.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The caller's own service account.
    pub account: ServiceAccount,
    /// Other accounts that the caller may request certificates for.
    pub may_impersonate: ServiceAccountPatterns,
}
