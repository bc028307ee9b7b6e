//! Is a CA's response what was requested? Every response of every source is verified here before
//! its certificate is used.

use std::time::SystemTime;

use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use spiffe::SpiffeId;
use x509_parser::prelude::{GeneralName, X509Certificate};
use zeroize::Zeroize;

use super::certificate::{Certificate, IssuedCertificate};
use super::clock::{MAX_CLOCK_SKEW, Now, from_unix_seconds};
use super::source::{IssueError, IssueFailure};
use super::trust_bundle::TrustBundle;
use super::verify_chain::verify_chain;

/// Longest chain that is accepted, including a root at its end. The chain without the root is sent
/// in every handshake.
const MAX_CHAIN_CERTIFICATES: usize = 6;
/// Largest chain that is accepted, for the same reason.
const MAX_CHAIN_BYTES: usize = 32 << 10;

/// Verifies a response and returns its certificate.
///
/// # Errors
/// Fails unless all of these hold: the chain is within its limits and parses; the leaf names exactly
/// `identity`, is valid now, and belongs to the key; the chain leads to `bundle`.
pub(super) fn verify_response(
    response: IssuedCertificate,
    identity: &SpiffeId,
    bundle: &TrustBundle,
    now: Now,
) -> Result<Certificate, IssueError> {
    verify(response, identity, bundle, now).map_err(|failure| failure.for_identity(identity))
}

fn verify(
    response: IssuedCertificate,
    identity: &SpiffeId,
    bundle: &TrustBundle,
    now: Now,
) -> Result<Certificate, IssueFailure> {
    let IssuedCertificate { mut chain, key } = response;
    check_size(&chain)?;
    // Peers have the roots. Only what they may lack is sent.
    chain.retain(|certificate| !bundle.roots().contains(certificate));
    let (not_before, not_after, serial) = {
        let leaf = parse_leaf(&chain)?;
        check_name(&leaf, identity)?;
        check_key(&leaf, &key)?;
        let (not_before, not_after) = check_validity(&leaf, now.wall)?;
        (not_before, not_after, serial(&leaf))
    };
    verify_chain(&chain, bundle, now.wall.max(not_before))
        .map_err(|message| IssueFailure::new("chain_untrusted", message))?;
    let remaining = not_after.duration_since(now.wall).unwrap_or_default();
    Ok(Certificate {
        identity: identity.clone(),
        chain,
        not_before,
        not_after,
        serial,
        expires_at: now.monotonic + remaining,
        key,
    })
}

/// Runs before anything is parsed.
fn check_size(chain: &[CertificateDer<'_>]) -> Result<(), IssueFailure> {
    let bytes: usize = chain.iter().map(|certificate| certificate.len()).sum();
    if chain.len() > MAX_CHAIN_CERTIFICATES || bytes > MAX_CHAIN_BYTES {
        let message = format!(
            "the chain has {} certificates and {bytes} bytes; the limits are {MAX_CHAIN_CERTIFICATES} and {MAX_CHAIN_BYTES}",
            chain.len()
        );
        return Err(IssueFailure::new("chain_too_long", message));
    }
    Ok(())
}

/// Parses every certificate, and returns the leaf.
fn parse_leaf<'a>(chain: &'a [CertificateDer<'_>]) -> Result<X509Certificate<'a>, IssueFailure> {
    for certificate in chain.iter().skip(1) {
        parse(certificate)?;
    }
    let leaf = chain
        .first()
        .ok_or_else(|| IssueFailure::malformed("the chain is empty"))?;
    let leaf = parse(leaf)?;
    if leaf.is_ca() {
        return Err(IssueFailure::malformed("the leaf is a CA certificate"));
    }
    Ok(leaf)
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, IssueFailure> {
    match x509_parser::parse_x509_certificate(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(IssueFailure::malformed(
            "extra bytes follow a certificate of the chain",
        )),
        Err(error) => Err(IssueFailure::malformed(format!(
            "a certificate of the chain cannot be parsed: {error}"
        ))),
    }
}

/// Requires exactly this identity, and no other name of any kind.
fn check_name(leaf: &X509Certificate<'_>, identity: &SpiffeId) -> Result<(), IssueFailure> {
    let names = leaf.subject_alternative_name().map_err(|error| {
        IssueFailure::malformed(format!("the leaf's names cannot be parsed: {error}"))
    })?;
    let names = names
        .map(|names| names.value.general_names.as_slice())
        .unwrap_or_default();
    let message = match names {
        [GeneralName::URI(uri)] if *uri == identity.to_string() => return Ok(()),
        [GeneralName::URI(uri)] => format!("the leaf is for {uri:?}"),
        [] => "the leaf has no name".to_owned(),
        _ => "the leaf has more than one name".to_owned(),
    };
    Err(IssueFailure::new("wrong_identity", message))
}

fn check_key(leaf: &X509Certificate<'_>, key: &[u8]) -> Result<(), IssueFailure> {
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
    let mut pair = KeyPair::try_from(&der)
        .map_err(|error| IssueFailure::malformed(format!("the key cannot be used: {error}")))?;
    let is_same_key = pair.subject_public_key_info() == leaf.public_key().raw;
    pair.zeroize();
    match is_same_key {
        true => Ok(()),
        false => Err(IssueFailure::new(
            "key_mismatch",
            "the leaf is for another key",
        )),
    }
}

fn check_validity(
    leaf: &X509Certificate<'_>,
    now: SystemTime,
) -> Result<(SystemTime, SystemTime), IssueFailure> {
    let [not_before, not_after] = [leaf.validity().not_before, leaf.validity().not_after]
        .map(|time| from_unix_seconds(time.timestamp()));
    if not_after <= now || not_after <= not_before {
        let ago = now.duration_since(not_after).unwrap_or_default();
        let message = format!("the leaf expired {ago:.0?} ago");
        return Err(IssueFailure::new("issued_expired", message));
    }
    let ahead = not_before.duration_since(now).unwrap_or_default();
    if ahead > MAX_CLOCK_SKEW {
        let message = format!(
            "the leaf becomes valid in {ahead:.0?}; check the clocks of this node and of the CA"
        );
        return Err(IssueFailure::new("issued_in_future", message));
    }
    Ok((not_before, not_after))
}

fn serial(leaf: &X509Certificate<'_>) -> String {
    leaf.raw_serial()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests;
