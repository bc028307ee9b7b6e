//! Which part of a response is the chain, and which are the roots?

use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::certs::clock::from_unix_seconds;
use crate::certs::source::IssueFailure;

/// More than any chain and any list of roots have together.
const MAX_CERTIFICATES: usize = 80;

/// The certificates of a response, not verified.
#[derive(Debug)]
pub(super) struct Response {
    /// Leaf first, then intermediates.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) roots: Vec<CertificateDer<'static>>,
}

/// Splits a response into chain and roots.
///
/// Istio's CA puts each certificate into an element of its own, including each of several roots.
/// Others put all roots into the last element. So the roots are the certificates of the last
/// element, and the self-signed ones before it.
pub(super) fn parse(elements: &[String]) -> Result<Response, IssueFailure> {
    let mut parsed = Vec::with_capacity(elements.len());
    let mut count = 0;
    for element in elements {
        let certificates = parse_pem(element)?;
        count += certificates.len();
        if count > MAX_CERTIFICATES {
            let message = format!("the response has more than {MAX_CERTIFICATES} certificates");
            return Err(IssueFailure::new("chain_too_long", message));
        }
        parsed.push(certificates);
    }
    let mut parsed = parsed.into_iter();
    let mut chain = parsed
        .next()
        .ok_or_else(|| IssueFailure::malformed("the response is empty"))?;
    if chain.is_empty() {
        return Err(IssueFailure::malformed("the response has no leaf"));
    }
    let mut roots = parsed.next_back().unwrap_or_default();
    let (self_signed, intermediates): (Vec<_>, Vec<_>) =
        parsed.flatten().partition(|der| is_self_signed(der));
    roots.extend(self_signed);
    chain.extend(intermediates);
    Ok(Response { chain, roots })
}

fn parse_pem(text: &str) -> Result<Vec<CertificateDer<'static>>, IssueFailure> {
    let certificates = CertificateDer::pem_slice_iter(text.as_bytes());
    certificates
        .take(MAX_CERTIFICATES + 1)
        .collect::<Result<_, _>>()
        .map_err(|_| IssueFailure::malformed("the response is not valid PEM"))
}

/// Compares names only. The signature is verified with the chain.
fn is_self_signed(der: &CertificateDer<'_>) -> bool {
    x509_parser::parse_x509_certificate(der)
        .is_ok_and(|(_, parsed)| parsed.is_ca() && parsed.subject() == parsed.issuer())
}

/// When the leaf expires, at most twice the requested lifetime from now: a response cannot keep its
/// roots for longer.
pub(super) fn expiry(chain: &[CertificateDer<'_>], now: SystemTime, ttl: Duration) -> SystemTime {
    let limit = now + ttl * 2;
    chain
        .first()
        .and_then(|leaf| x509_parser::parse_x509_certificate(leaf).ok())
        .map_or(limit, |(_, leaf)| {
            from_unix_seconds(leaf.validity().not_after.timestamp()).min(limit)
        })
}
