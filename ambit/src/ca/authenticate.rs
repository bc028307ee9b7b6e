//! Who asks.

use std::pin::Pin;

use spiffe::SpiffeId;
use tonic::Code;

use super::account::{Account, Accounts};
use super::refusal::Refusal;

/// Finds out who a request is from. Signed tokens today; the token reviews of Kubernetes fit too,
/// for an answer may take a while.
pub trait Authenticator: Send + Sync {
    /// Who holds this bearer token, if one came.
    fn authenticate<'a>(&'a self, token: Option<&'a str>) -> Authenticating<'a>;
}

/// A caller that is being recognised.
pub type Authenticating<'a> =
    Pin<Box<dyn Future<Output = Result<Caller, Unauthenticated>> + Send + 'a>>;

/// Who asks, and for whom it may.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Itself.
    pub account: Account,
    /// For whom it may ask beside itself.
    pub may_speak_for: Accounts,
}

impl Caller {
    /// The account to sign for: the caller's own, or the one that it names, if it may.
    pub(super) fn speaks_for(&self, asked: Option<Account>) -> Result<Account, Refusal> {
        let account = asked.unwrap_or_else(|| self.account.clone());
        if account == self.account || self.may_speak_for.contain(&account) {
            return Ok(account);
        }
        let message = format!("{} may not speak for {account}", self.account);
        Err(Refusal::denied(message))
    }
}

/// Nobody in particular asks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Unauthenticated {
    /// Stable reason code.
    pub reason: &'static str,
    /// For the operator; nothing of the token.
    pub message: String,
}

impl Unauthenticated {
    pub(super) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }
}

impl From<Unauthenticated> for Refusal {
    fn from(error: Unauthenticated) -> Self {
        Self::new(error.reason, Code::Unauthenticated, error.message)
    }
}

/// The identity that a request asks to impersonate has to be an account's.
pub(super) fn account(
    identity: &str,
    trust_domain: &spiffe::TrustDomain,
) -> Result<Account, Refusal> {
    let malformed = |why: &str| {
        let shown: String = identity.chars().take(256).collect();
        Refusal::invalid("identity_malformed", format!("{shown:?} {why}"))
    };
    let identity: SpiffeId = identity
        .parse()
        .map_err(|_| malformed("is no SPIFFE identity"))?;
    if identity.trust_domain() != trust_domain {
        let message = format!(
            "{identity} is not of the trust domain {trust_domain}, for which this authority signs"
        );
        return Err(Refusal::new(
            "foreign_trust_domain",
            Code::PermissionDenied,
            message,
        ));
    }
    Account::from_identity(&identity)
        .ok_or_else(|| malformed("is not of the form /ns/<namespace>/sa/<service account>"))
}
