//! May the caller have this certificate, and for how long? Pure functions of the request, the caller
//! and the limits.

use std::time::Duration;

use prost_types::Struct;
use prost_types::value::Kind;
use spiffe::{SpiffeId, TrustDomain};
use tonic::Code;

use super::authentication::Caller;
use super::config::TtlLimits;
use super::refusal::Refusal;
use super::service_account::ServiceAccount;

/// Metadata field of a request for an identity that is not the caller's own.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// Longest part of a malformed identity that a refusal quotes, in characters.
const MAX_QUOTED_CHARS: usize = 256;

/// The identity of the certificate: the one in the request's metadata if the caller may impersonate
/// it, the caller's own if there is none.
///
/// # Errors
/// Refuses identities that are malformed, of another trust domain, or not permitted to the caller.
pub(super) fn identity(
    metadata: Option<&Struct>,
    caller: &Caller,
    trust_domain: &TrustDomain,
) -> Result<SpiffeId, Refusal> {
    let account = match requested_account(metadata, trust_domain)? {
        Some(requested) => impersonated(requested, caller)?,
        None => caller.account.clone(),
    };
    account.identity(trust_domain).ok_or_else(|| {
        Refusal::invalid(
            "identity_malformed",
            format!("{account} has no valid SPIFFE identity"),
        )
    })
}

/// The lifetime of the certificate. A request without a positive number of seconds gets the default.
/// A longer one than the maximum is cut: the caller sees the lifetime in the certificate.
///
/// # Errors
/// Refuses a lifetime below the minimum; the certificate would have to be valid for longer than
/// requested.
pub(super) fn ttl(seconds: i64, limits: &TtlLimits) -> Result<Duration, Refusal> {
    let Some(seconds) = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0) else {
        return Ok(limits.default);
    };
    let requested = Duration::from_secs(seconds);
    if requested < limits.min {
        let message = format!(
            "{requested:?} is shorter than the minimum of {:?}",
            limits.min
        );
        return Err(Refusal::invalid("ttl_too_short", message));
    }
    Ok(requested.min(limits.max))
}

fn requested_account(
    metadata: Option<&Struct>,
    trust_domain: &TrustDomain,
) -> Result<Option<ServiceAccount>, Refusal> {
    let field = metadata.and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY));
    match field.and_then(|value| value.kind.as_ref()) {
        None | Some(Kind::NullValue(_)) => Ok(None),
        // As in Istio, an empty string requests no identity.
        Some(Kind::StringValue(identity)) if identity.is_empty() => Ok(None),
        Some(Kind::StringValue(identity)) => account_of(identity, trust_domain).map(Some),
        Some(_) => {
            let message = format!("{IMPERSONATED_IDENTITY} is not a string");
            Err(Refusal::invalid("identity_malformed", message))
        }
    }
}

/// The service account of a SPIFFE identity of this trust domain.
fn account_of(identity: &str, trust_domain: &TrustDomain) -> Result<ServiceAccount, Refusal> {
    let malformed = |problem: &str| {
        let quoted: String = identity.chars().take(MAX_QUOTED_CHARS).collect();
        Refusal::invalid("identity_malformed", format!("{quoted:?} {problem}"))
    };
    let identity: SpiffeId = identity
        .parse()
        .map_err(|_| malformed("is not a SPIFFE identity"))?;
    if identity.trust_domain() != trust_domain {
        let message = format!(
            "{identity} is not in the trust domain {trust_domain} of this certificate authority"
        );
        return Err(Refusal::new(
            "foreign_trust_domain",
            Code::PermissionDenied,
            message,
        ));
    }
    ServiceAccount::from_identity(&identity)
        .ok_or_else(|| malformed("is not of the form /ns/<namespace>/sa/<service account>"))
}

fn impersonated(requested: ServiceAccount, caller: &Caller) -> Result<ServiceAccount, Refusal> {
    if requested == caller.account || caller.may_impersonate.matches(&requested) {
        return Ok(requested);
    }
    let message = format!("{} may not impersonate {requested}", caller.account);
    Err(Refusal::new("not_allowed", Code::PermissionDenied, message))
}

#[cfg(test)]
mod tests;
