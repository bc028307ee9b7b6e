//! From when to when is a certificate, or a path of CA certificates, valid?

use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::X509Certificate;

use super::files::parse;
use crate::certs::clock::{MAX_CLOCK_SKEW, from_unix_seconds};

/// A certificate is valid from this long before it was issued: five minutes for peers whose clocks
/// are behind, and five more for a CA whose own clock is ahead.
pub const BACKDATE: Duration = Duration::from_secs(600);

/// From when to when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The start.
    pub not_before: SystemTime,
    /// The end.
    pub not_after: SystemTime,
}

impl Validity {
    /// From [`BACKDATE`] before now until `ttl` after now.
    pub fn new(now: SystemTime, ttl: Duration) -> Self {
        Self {
            not_before: now - BACKDATE,
            not_after: now + ttl,
        }
    }

    fn of(certificate: &X509Certificate<'_>) -> Self {
        let validity = certificate.validity();
        Self {
            not_before: from_unix_seconds(validity.not_before.timestamp()),
            not_after: from_unix_seconds(validity.not_after.timestamp()),
        }
    }

    fn intersection(self, other: Self) -> Self {
        Self {
            not_before: self.not_before.max(other.not_before),
            not_after: self.not_after.min(other.not_after),
        }
    }
}

/// When the signer and all certificates between it and the root are valid: peers reject its
/// signatures before and after. Of several certificates with one subject, those count that are
/// already valid, and of these the one that expires last.
pub(super) fn of_path(
    signer: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: SystemTime,
) -> Result<Validity, String> {
    let others = intermediates.iter().map(parse);
    let mut others = others.collect::<Result<Vec<_>, _>>()?;
    let mut current = parse(signer)?;
    let mut path = Validity::of(&current);
    loop {
        others.retain(|other| other.subject() != current.subject());
        let issuers = others
            .iter()
            .filter(|other| other.subject() == current.issuer());
        let best = issuers.max_by_key(|issuer| {
            let validity = Validity::of(issuer);
            (
                validity.not_before <= now + MAX_CLOCK_SKEW,
                validity.not_after,
            )
        });
        let Some(issuer) = best.cloned() else {
            return Ok(path);
        };
        path = path.intersection(Validity::of(&issuer));
        current = issuer;
    }
}
