//! What an authority answers: texts, of which the first is the leaf and the last holds the roots.

use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::super::verify::at;
use super::{Fault, GARBAGE};

/// Longer than any chain and any list of roots.
const CERTIFICATES_MOST: usize = 80;

/// An answer, split.
#[derive(Debug)]
pub(super) struct Answer {
    /// Leaf first, then intermediates.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) roots: Vec<CertificateDer<'static>>,
}

/// Takes an answer apart. Whether it is any good is for whoever verifies it to say.
///
/// Istio's authority gives each certificate an element of its own, several roots included; others
/// put all roots into the last element. So a root is what is in the last element, and what signed
/// itself before that.
pub(super) fn read(texts: &[String]) -> Result<Answer, Fault> {
    let garbage = |message: &str| (GARBAGE, message.to_owned());
    let mut elements = Vec::with_capacity(texts.len());
    let mut count = 0;
    for text in texts {
        let certificates = certificates(text)?;
        count += certificates.len();
        if count > CERTIFICATES_MOST {
            let message = format!("the answer holds more than {CERTIFICATES_MOST} certificates");
            return Err(("chain_too_long", message));
        }
        elements.push(certificates);
    }
    let mut elements = elements.into_iter();
    let mut chain = elements
        .next()
        .ok_or_else(|| garbage("the answer is empty"))?;
    if chain.is_empty() {
        return Err(garbage("the answer holds no leaf"));
    }
    let mut roots = elements.next_back().unwrap_or_default();
    let (own, between): (Vec<_>, Vec<_>) = elements.flatten().partition(|der| signed_itself(der));
    roots.extend(own);
    chain.extend(between);
    Ok(Answer { chain, roots })
}

fn certificates(text: &str) -> Result<Vec<CertificateDer<'static>>, Fault> {
    let read = CertificateDer::pem_slice_iter(text.as_bytes());
    read.take(CERTIFICATES_MOST + 1)
        .collect::<Result<_, _>>()
        .map_err(|_| (GARBAGE, "the answer is no PEM".to_owned()))
}

fn signed_itself(der: &CertificateDer<'_>) -> bool {
    x509_parser::parse_x509_certificate(der)
        .is_ok_and(|(_, parsed)| parsed.is_ca() && parsed.subject() == parsed.issuer())
}

/// Until when the leaf is valid, or would be if it were as asked: an answer cannot make its roots
/// stay for longer than twice that.
pub(super) fn end(chain: &[CertificateDer<'_>], now: SystemTime, ttl: Duration) -> SystemTime {
    let asked = now + ttl * 2;
    chain
        .first()
        .and_then(|leaf| x509_parser::parse_x509_certificate(leaf).ok())
        .map_or(asked, |(_, leaf)| {
            at(leaf.validity().not_after.timestamp()).min(asked)
        })
}
