//! What a request may have: pure functions from the request, the caller and the limits.

use std::time::Duration;

use prost_types::Struct;
use prost_types::value::Kind;
use rcgen::SubjectPublicKeyInfo;
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use spiffe::{SpiffeId, TrustDomain};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_NIST_EC_P384};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo as ParsedKey;

use super::authenticate::{Caller, account};
use super::config::Limits;
use super::refusal::Refusal;

/// Where a request names the identity, if it is not the caller's own.
const IMPERSONATED: &str = "ImpersonatedIdentity";
/// Requests of RSA 4096 have two kilobytes.
const CSR_MOST: usize = 16 * 1024;
/// Weaker keys can be broken within the life of a certificate, stronger ones cost whoever checks
/// their signatures more than they are worth.
const RSA_LEAST: usize = 2048;
const RSA_MOST: usize = 4096;

/// The identity to sign for: what the request names, if the caller may; else the caller's own.
pub(super) fn identity(
    metadata: Option<&Struct>,
    caller: &Caller,
    trust_domain: &TrustDomain,
) -> Result<SpiffeId, Refusal> {
    let asked = metadata.and_then(|metadata| metadata.fields.get(IMPERSONATED));
    let asked = match asked.and_then(|value| value.kind.as_ref()) {
        None | Some(Kind::NullValue(_)) => None,
        // Istio takes an empty one for none.
        Some(Kind::StringValue(identity)) if identity.is_empty() => None,
        Some(Kind::StringValue(identity)) => Some(account(identity, trust_domain)?),
        Some(_) => {
            let message = format!("{IMPERSONATED} is not a string");
            return Err(Refusal::invalid("identity_malformed", message));
        }
    };
    let account = caller.speaks_for(asked)?;
    account
        .identity(trust_domain)
        .ok_or_else(|| Refusal::invalid("identity_malformed", format!("{account} is no identity")))
}

/// How long the certificate may live. Not positive means that the caller does not mind; too long is
/// cut, for the caller sees in the certificate what it got; too short is refused, for it would have
/// to be made longer than asked.
pub(super) fn ttl(seconds: i64, limits: &Limits) -> Result<Duration, Refusal> {
    let Some(asked) = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0) else {
        return Ok(limits.default_ttl);
    };
    let asked = Duration::from_secs(asked);
    if asked < limits.min_ttl {
        let message = format!(
            "{asked:?} is shorter than {:?}, the least that is signed here",
            limits.min_ttl
        );
        return Err(Refusal::invalid("ttl_too_short", message));
    }
    Ok(asked.min(limits.max_ttl))
}

/// The key of a request whose sender has proven to hold the other half. Names, usages and all else
/// in it are not looked at.
pub(super) fn key(csr: &str) -> Result<SubjectPublicKeyInfo, Refusal> {
    let malformed = |message: &str| Refusal::invalid("csr_malformed", message);
    if csr.len() > CSR_MOST {
        return Err(malformed("the request is too large"));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes())
        .map_err(|_| malformed("it is no certificate signing request in PEM"))?;
    let (rest, parsed) = X509CertificationRequest::from_der(&der)
        .map_err(|_| malformed("the certificate signing request cannot be read"))?;
    if !rest.is_empty() {
        return Err(malformed(
            "something follows the certificate signing request",
        ));
    }
    let key = &parsed.certification_request_info.subject_pki;
    // Before its signature is checked, which costs as much as the key is large.
    acceptable(key)?;
    parsed.verify_signature().map_err(|_| {
        let message = "the request is not signed with the key that it asks to certify";
        Refusal::invalid("csr_signature", message)
    })?;
    SubjectPublicKeyInfo::from_der(key.raw)
        .map_err(|_| Refusal::invalid("csr_key", "the key is of a kind that is not certified"))
}

fn acceptable(key: &ParsedKey<'_>) -> Result<(), Refusal> {
    let refused = |message: String| Err(Refusal::invalid("csr_key", message));
    match key.parsed() {
        Ok(PublicKey::EC(_)) => {
            let parameters = key.algorithm.parameters.as_ref();
            let curve = parameters.and_then(|parameters| parameters.as_oid().ok());
            if curve.is_some_and(|curve| curve == OID_EC_P256 || curve == OID_NIST_EC_P384) {
                return Ok(());
            }
            refused("the key is of another curve than P-256 and P-384".to_owned())
        }
        Ok(PublicKey::RSA(rsa)) => match rsa.key_size() {
            RSA_LEAST..=RSA_MOST => Ok(()),
            bits => refused(format!(
                "an RSA key of {bits} bits; {RSA_LEAST} to {RSA_MOST} are certified"
            )),
        },
        _ => refused("the key is neither of P-256 or P-384 nor RSA".to_owned()),
    }
}

#[cfg(test)]
mod tests;
