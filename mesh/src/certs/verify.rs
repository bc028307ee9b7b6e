//! What a source answers is verified before anybody relies on it.

use std::time::{Duration, SystemTime};

use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, UnixTime};
use spiffe::SpiffeId;
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{GeneralName, X509Certificate};
use zeroize::Zeroize;

use super::slots::Now;
use super::{Certificate, IssueError, IssuedCertificate, TrustBundle};

/// How far clocks may be apart. A certificate that starts this much in the future is one that was
/// issued now, by somebody whose clock is ahead.
pub(super) const SKEW: Duration = Duration::from_secs(300);
/// Longest chain, with a root that may come at its end; what is left of it without that is in every
/// handshake.
const MAX_CHAIN: usize = 6;
/// Largest chain in bytes, for the same reason.
const MAX_CHAIN_BYTES: usize = 32 << 10;

/// The certificate that an answer holds, if it is one for this identity, that peers with this bundle
/// accept, now and for a while.
pub(super) fn verify(
    issued: IssuedCertificate,
    identity: &SpiffeId,
    bundle: &TrustBundle,
    now: Now,
) -> Result<Certificate, IssueError> {
    let error = |(code, message): Refusal| IssueError::new(identity, code, message);
    let IssuedCertificate { mut chain, key } = issued;
    bounded(&chain).map_err(error)?;
    // Peers know the roots; what they are sent is what they may lack.
    let own = |certificate: &CertificateDer<'_>| !bundle.roots().contains(certificate);
    chain.retain(own);
    let (not_before, not_after, serial) = {
        let leaf = leaf(&chain).map_err(error)?;
        names(&leaf, identity).map_err(error)?;
        belongs(&leaf, &key).map_err(error)?;
        let validity = validity(&leaf, now.wall).map_err(error)?;
        (validity.0, validity.1, serial(&leaf))
    };
    chains(&chain, bundle, now.wall.max(not_before))
        .map_err(|message| error(("chain_untrusted", message)))?;
    let left = not_after.duration_since(now.wall).unwrap_or_default();
    Ok(Certificate {
        identity: identity.clone(),
        chain,
        not_before,
        not_after,
        serial,
        ends: now.steady + left,
        key,
    })
}

/// Reason code, and a sentence for the operator.
type Refusal = (&'static str, String);

/// Before anything is parsed.
fn bounded(chain: &[CertificateDer<'_>]) -> Result<(), Refusal> {
    let bytes: usize = chain.iter().map(|certificate| certificate.len()).sum();
    if chain.len() > MAX_CHAIN || bytes > MAX_CHAIN_BYTES {
        let message = format!(
            "{} certificates of {bytes} bytes; at most {MAX_CHAIN} of {MAX_CHAIN_BYTES} are taken",
            chain.len()
        );
        return Err(("chain_too_long", message));
    }
    Ok(())
}

fn leaf<'a>(chain: &'a [CertificateDer<'_>]) -> Result<X509Certificate<'a>, Refusal> {
    let garbage = |message: String| ("issued_garbage", message);
    for certificate in chain.iter().skip(1) {
        parse(certificate).map_err(garbage)?;
    }
    let leaf = chain
        .first()
        .ok_or_else(|| garbage("the chain is empty".to_owned()))?;
    let leaf = parse(leaf).map_err(garbage)?;
    if leaf.is_ca() {
        return Err(garbage("the leaf is an authority".to_owned()));
    }
    Ok(leaf)
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    match x509_parser::parse_x509_certificate(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err("something follows a certificate".to_owned()),
        Err(error) => Err(format!("a certificate cannot be read: {error}")),
    }
}

/// Exactly this identity, and no other name of any kind.
fn names(leaf: &X509Certificate<'_>, identity: &SpiffeId) -> Result<(), Refusal> {
    let names = leaf
        .subject_alternative_name()
        .map_err(|error| ("issued_garbage", format!("the leaf's names: {error}")))?;
    let names = names
        .map(|names| names.value.general_names.as_slice())
        .unwrap_or_default();
    match names {
        [GeneralName::URI(uri)] if *uri == identity.to_string() => Ok(()),
        [GeneralName::URI(uri)] => Err(("wrong_identity", format!("it is for {uri:?}"))),
        [] => Err(("wrong_identity", "it names nobody".to_owned())),
        _ => Err(("wrong_identity", "it has more names than one".to_owned())),
    }
}

fn belongs(leaf: &X509Certificate<'_>, key: &[u8]) -> Result<(), Refusal> {
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
    let mut pair = KeyPair::try_from(&der)
        .map_err(|error| ("issued_garbage", format!("the key cannot be used: {error}")))?;
    let same = pair.subject_public_key_info() == leaf.public_key().raw;
    pair.zeroize();
    match same {
        true => Ok(()),
        false => Err(("key_mismatch", "the leaf is for another key".to_owned())),
    }
}

fn validity(
    leaf: &X509Certificate<'_>,
    now: SystemTime,
) -> Result<(SystemTime, SystemTime), Refusal> {
    let [not_before, not_after] =
        [leaf.validity().not_before, leaf.validity().not_after].map(|time| at(time.timestamp()));
    if not_after <= now || not_after <= not_before {
        let ago = now.duration_since(not_after).unwrap_or_default();
        return Err(("issued_expired", format!("it expired {ago:.0?} ago")));
    }
    let ahead = not_before.duration_since(now).unwrap_or_default();
    if ahead > SKEW {
        let message = format!("it is not valid for another {ahead:.0?}; are the clocks right?");
        return Err(("issued_in_future", message));
    }
    Ok((not_before, not_after))
}

/// As peers will verify it, for both sides of a handshake.
pub(super) fn chains(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: SystemTime,
) -> Result<(), String> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err("the chain is empty".to_owned());
    };
    if bundle.is_empty() {
        return Err("the roots are not known yet".to_owned());
    }
    let leaf = EndEntityCert::try_from(leaf).map_err(|error| error.to_string())?;
    let now = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        leaf.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            bundle.anchors(),
            intermediates,
            UnixTime::since_unix_epoch(now),
            usage,
            None,
            None,
        )
        .map_err(|error| format!("it does not chain to the trust bundle: {error}"))?;
    }
    Ok(())
}

fn serial(leaf: &X509Certificate<'_>) -> String {
    leaf.raw_serial()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Times before 1970 are all the same to the mesh: long past.
pub(super) fn at(timestamp: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(timestamp).unwrap_or(0))
}

#[cfg(test)]
mod tests;
