//! What the agent answers, read and judged. Pure functions.

use rustls_pki_types::CertificateDer;
use spiffe::{SpiffeId, TrustDomain};
use spire_api::pb::spire::api::agent::delegatedidentity::v1::{
    SubscribeToX509BundlesResponse, SubscribeToX509sviDsResponse, X509svidWithKey,
};
use zeroize::Zeroizing;

use super::TrustBundle;
use super::agent::Failure;

/// Most identities that a message names.
const NAMED_MAX: usize = 4;

/// One SVID that is ours to use. The key is wiped when it is dropped; never printed.
pub(super) struct Svid {
    /// Leaf first.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: Zeroizing<Vec<u8>>,
}

/// The SVID of an answer that names exactly the wanted identity; the first, where SPIRE has
/// several entries for it. All others are dropped unread.
pub(super) fn wanted(
    answer: SubscribeToX509sviDsResponse,
    identity: &SpiffeId,
) -> Result<Svid, Failure> {
    if answer.x509_svids.is_empty() {
        let message = "SPIRE has no entry for it on this node (selectors k8s:ns and k8s:sa)";
        return Err(Failure::new("spire_no_entry", message));
    }
    let mut others = Vec::new();
    for svid in answer.x509_svids {
        match name(&svid) {
            Some(name) if name == *identity => return read(svid),
            Some(name) => others.push(name.to_string()),
            None => {}
        }
    }
    if others.is_empty() {
        let message = "SPIRE gave no certificate that can be read and has one SPIFFE id";
        return Err(Failure::new("issued_garbage", message));
    }
    others.truncate(NAMED_MAX);
    let message = format!("SPIRE offers {} instead; refused", others.join(", "));
    Err(Failure::new("wrong_identity", message))
}

/// Who the leaf speaks for; what the agent writes beside it proves nothing.
fn name(svid: &X509svidWithKey) -> Option<SpiffeId> {
    let leaf = svid.x509_svid.as_ref()?.cert_chain.first()?;
    let (rest, leaf) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let names = leaf.subject_alternative_name().ok()??.value;
    match names.general_names.as_slice() {
        [x509_parser::extensions::GeneralName::URI(uri)] if rest.is_empty() => {
            // Only the canonical spelling: what is compared is what peers will read.
            SpiffeId::new(*uri).ok().filter(|id| id.to_string() == *uri)
        }
        _ => None,
    }
}

fn read(svid: X509svidWithKey) -> Result<Svid, Failure> {
    let garbage = |message| Err(Failure::new("issued_garbage", message));
    if svid.x509_svid_key.is_empty() {
        return garbage("SPIRE gave an SVID without its key");
    }
    // gRPC's own buffers are out of reach and are not wiped; this is the one copy that is kept.
    let key = Zeroizing::new(svid.x509_svid_key.to_vec());
    let Some(document) = svid.x509_svid else {
        return garbage("SPIRE gave a key without a certificate");
    };
    let chain = document.cert_chain.iter();
    let chain = chain.map(|der| CertificateDer::from(der.to_vec()));
    Ok(Svid {
        chain: chain.collect(),
        key,
    })
}

/// The bundle of the own trust domain, and the names of the others, which are not trusted.
pub(super) fn bundle(
    answer: &SubscribeToX509BundlesResponse,
    own: &TrustDomain,
) -> Result<(TrustBundle, Vec<String>), Failure> {
    let (mut bundle, mut others) = (None, Vec::new());
    for (key, der) in &answer.ca_certificates {
        match trust_domain(key) {
            Some(name) if name == *own => {
                if bundle.replace(roots(der)?).is_some() {
                    let message = format!("SPIRE gave two bundles for {own}");
                    return Err(Failure::new("bundle_garbage", message));
                }
            }
            Some(name) => others.push(name.to_string()),
            None => others.push(key.escape_debug().take(64).collect()),
        }
    }
    others.sort_unstable();
    let has = others.join(", ");
    let message = format!("SPIRE has no bundle of the trust domain {own}; it has: {has}");
    let missing = || Failure::new("bundle_missing", message);
    Ok((bundle.ok_or_else(missing)?, others))
}

/// Agents send `spiffe://name`; the protocol's text says `name`.
fn trust_domain(key: &str) -> Option<TrustDomain> {
    let name = key.strip_prefix("spiffe://").unwrap_or(key);
    let domain = TrustDomain::new(name).ok();
    domain.filter(|domain| domain.to_string() == name)
}

/// Certificates, one after the other. A bundle that is not whole is none: with a root missing,
/// peers would be refused that are to be trusted.
fn roots(mut der: &[u8]) -> Result<TrustBundle, Failure> {
    let garbage = |message: String| Failure::new("bundle_garbage", message);
    let mut roots = Vec::new();
    while !der.is_empty() {
        let (rest, _) = x509_parser::parse_x509_certificate(der)
            .map_err(|error| garbage(format!("SPIRE's bundle cannot be read: {error}")))?;
        let (one, _) = der.split_at(der.len() - rest.len());
        roots.push(CertificateDer::from(one.to_vec()));
        der = rest;
    }
    TrustBundle::new(roots).map_err(|error| garbage(format!("SPIRE's bundle: {error}")))
}
