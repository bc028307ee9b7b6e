//! Which SVID and which bundle does a response of the agent contain? Pure functions.

use rustls_pki_types::CertificateDer;
use spiffe::{SpiffeId, TrustDomain};
use spire_api::pb::spire::api::agent::delegatedidentity::v1::{
    SubscribeToX509BundlesResponse, SubscribeToX509sviDsResponse, X509svidWithKey,
};
use x509_parser::extensions::GeneralName;
use zeroize::Zeroizing;

use crate::certs::certificate::IssuedCertificate;
use crate::certs::source::IssueFailure;
use crate::certs::trust_bundle::TrustBundle;

/// Limit of other identities that an error message lists.
const MAX_LISTED_IDENTITIES: usize = 4;
/// Limit of a trust domain's name in a message, if the name is not valid.
const MAX_NAME_CHARS: usize = 64;

/// The SVID with exactly this SPIFFE ID: the first one, if SPIRE has several entries for it. All
/// others are dropped without reading their keys.
pub(super) fn svid(
    response: SubscribeToX509sviDsResponse,
    identity: &SpiffeId,
) -> Result<IssuedCertificate, IssueFailure> {
    if response.x509_svids.is_empty() {
        let message =
            "SPIRE has no entry for the identity on this node (selectors k8s:ns and k8s:sa)";
        return Err(IssueFailure::new("spire_no_entry", message));
    }
    let mut others = Vec::new();
    for svid in response.x509_svids {
        match spiffe_id(&svid) {
            Some(name) if name == *identity => return convert(svid),
            Some(name) => others.push(name.to_string()),
            None => {}
        }
    }
    if others.is_empty() {
        return Err(IssueFailure::malformed(
            "no SVID from SPIRE can be parsed and has exactly one SPIFFE ID",
        ));
    }
    others.truncate(MAX_LISTED_IDENTITIES);
    let message = format!("SPIRE offers only {}; rejected", others.join(", "));
    Err(IssueFailure::new("wrong_identity", message))
}

/// The SPIFFE ID of the leaf. The `id` field of the response is not authenticated and not used.
fn spiffe_id(svid: &X509svidWithKey) -> Option<SpiffeId> {
    let leaf = svid.x509_svid.as_ref()?.cert_chain.first()?;
    let (rest, leaf) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let names = leaf.subject_alternative_name().ok()??.value;
    match names.general_names.as_slice() {
        [GeneralName::URI(uri)] if rest.is_empty() => {
            // Only the canonical form: peers compare the bytes of the certificate.
            SpiffeId::new(*uri).ok().filter(|id| id.to_string() == *uri)
        }
        _ => None,
    }
}

fn convert(svid: X509svidWithKey) -> Result<IssuedCertificate, IssueFailure> {
    if svid.x509_svid_key.is_empty() {
        return Err(IssueFailure::malformed("SPIRE sent an SVID without a key"));
    }
    // The buffers of the gRPC library cannot be wiped. This is the only other copy.
    let key = Zeroizing::new(svid.x509_svid_key.to_vec());
    let Some(document) = svid.x509_svid else {
        return Err(IssueFailure::malformed(
            "SPIRE sent a key without a certificate",
        ));
    };
    let chain = document.cert_chain.iter();
    let chain = chain.map(|der| CertificateDer::from(der.to_vec()));
    Ok(IssuedCertificate {
        chain: chain.collect(),
        key,
    })
}

/// The bundle of this trust domain, and the names of the other trust domains, whose bundles are not
/// trusted.
pub(super) fn bundle(
    response: &SubscribeToX509BundlesResponse,
    trust_domain: &TrustDomain,
) -> Result<(TrustBundle, Vec<String>), IssueFailure> {
    let (mut bundle, mut others) = (None, Vec::new());
    for (key, der) in &response.ca_certificates {
        match parse_trust_domain(key) {
            Some(name) if name == *trust_domain => {
                if bundle.replace(parse_roots(der)?).is_some() {
                    let message = format!("SPIRE sent two bundles for {trust_domain}");
                    return Err(IssueFailure::new("bundle_garbage", message));
                }
            }
            Some(name) => others.push(name.to_string()),
            None => others.push(key.escape_debug().take(MAX_NAME_CHARS).collect()),
        }
    }
    others.sort_unstable();
    let missing = || {
        let names = others.join(", ");
        let message = format!(
            "SPIRE has no bundle of the trust domain {trust_domain}; it has bundles of: {names}"
        );
        IssueFailure::new("bundle_missing", message)
    };
    Ok((bundle.ok_or_else(missing)?, others))
}

/// Agents send `spiffe://name`. The protocol documentation says `name`.
fn parse_trust_domain(key: &str) -> Option<TrustDomain> {
    let name = key.strip_prefix("spiffe://").unwrap_or(key);
    let domain = TrustDomain::new(name).ok();
    domain.filter(|domain| domain.to_string() == name)
}

/// Parses concatenated certificates. A bundle is complete or an error: without one of its roots,
/// trusted peers would be rejected.
fn parse_roots(mut der: &[u8]) -> Result<TrustBundle, IssueFailure> {
    let malformed = |message: String| IssueFailure::new("bundle_garbage", message);
    let mut roots = Vec::new();
    while !der.is_empty() {
        let (rest, _) = x509_parser::parse_x509_certificate(der)
            .map_err(|error| malformed(format!("the bundle of SPIRE cannot be parsed: {error}")))?;
        let (root, _) = der.split_at(der.len() - rest.len());
        roots.push(CertificateDer::from(root.to_vec()));
        der = rest;
    }
    TrustBundle::new(roots).map_err(|error| malformed(format!("the bundle of SPIRE: {error}")))
}
