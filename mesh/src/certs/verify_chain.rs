//! Does a certificate chain lead to a root of the trust bundle?

use std::time::SystemTime;

use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage};

use super::trust_bundle::TrustBundle;

/// Verifies a chain as peers do, for the client and the server side of a handshake. The error is a
/// message for the operator.
pub(super) fn verify_chain(
    chain: &[CertificateDer<'_>],
    bundle: &TrustBundle,
    now: SystemTime,
) -> Result<(), String> {
    let Some((leaf, intermediates)) = chain.split_first() else {
        return Err("the chain is empty".to_owned());
    };
    if bundle.is_empty() {
        return Err("the trust bundle is not known yet".to_owned());
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
        .map_err(|error| format!("the chain does not lead to the trust bundle: {error}"))?;
    }
    Ok(())
}
