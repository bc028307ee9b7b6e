//! Which cryptographic libraries TLS uses: aws-lc-rs for signatures and key exchange, the faster of ring and AWS-LC for
//! record encryption.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use rustls::SupportedCipherSuite;
use rustls::crypto::aws_lc_rs::{self, kx_group};
use rustls::crypto::{CryptoProvider, ring};

/// A library that encrypts TLS records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AeadBackend {
    /// ring
    Ring,
    /// AWS-LC
    AwsLc,
}

/// The library that encrypts TLS records in this process.
///
/// Which one is faster depends on the CPU: on AMD Zen 3 (VAES, no AVX-512) ring seals AES-256-GCM at 6.7 GB/s and
/// AWS-LC at 2.0 GB/s; with AVX-512, AWS-LC has the better code. The first call measures both, which takes 2 ms, so a
/// daemon makes it at start-up.
pub fn aead_backend() -> AeadBackend {
    *AEAD_BACKEND
}

static AEAD_BACKEND: LazyLock<AeadBackend> = LazyLock::new(|| {
    if best_time(seal_ring) <= best_time(seal_aws_lc) {
        AeadBackend::Ring
    } else {
        AeadBackend::AwsLc
    }
});

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: suites(aead_backend()),
        // Hybrid first: traffic that is recorded today stays secret from a future quantum computer. X25519 is for peers
        // without support.
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
        ..aws_lc_rs::default_provider()
    })
});

fn suites(backend: AeadBackend) -> Vec<SupportedCipherSuite> {
    match backend {
        AeadBackend::Ring => vec![
            ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
            ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        AeadBackend::AwsLc => vec![
            aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
    }
}

/// The shortest of several rounds, because a round may be interrupted. About 2 ms in total.
fn best_time(seal: fn(&mut Vec<u8>)) -> Duration {
    const RECORD_BYTES: usize = 16 * 1024;
    const ROUNDS: usize = 16;
    const RECORDS_PER_ROUND: usize = 16;
    let mut record = Vec::with_capacity(RECORD_BYTES + 64);
    let round = |_| {
        let start = Instant::now();
        for _ in 0..RECORDS_PER_ROUND {
            record.clear();
            record.resize(RECORD_BYTES, 0);
            seal(&mut record);
        }
        start.elapsed()
    };
    (0..ROUNDS).map(round).min().unwrap_or(Duration::MAX)
}

fn seal_ring(record: &mut Vec<u8>) {
    use ::ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    if let Ok(key) = UnboundKey::new(&AES_256_GCM, &[0; 32]) {
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let _sealed = LessSafeKey::new(key).seal_in_place_append_tag(nonce, Aad::empty(), record);
    }
}

fn seal_aws_lc(record: &mut Vec<u8>) {
    use ::aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    if let Ok(key) = UnboundKey::new(&AES_256_GCM, &[0; 32]) {
        let nonce = Nonce::assume_unique_for_key([0; 12]);
        let _sealed = LessSafeKey::new(key).seal_in_place_append_tag(nonce, Aad::empty(), record);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backend_is_chosen_once() {
        assert_eq!(aead_backend(), aead_backend());
        assert!(best_time(seal_ring) < Duration::from_secs(1));
        assert!(best_time(seal_aws_lc) < Duration::from_secs(1));
    }

    #[test]
    fn backends_offer_the_same_suites_and_prefer_hybrid_key_exchange() {
        let names = |backend| {
            suites(backend)
                .iter()
                .map(|s| s.suite())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(AeadBackend::Ring), names(AeadBackend::AwsLc));
        let groups: Vec<_> = provider().kx_groups.iter().map(|g| g.name()).collect();
        assert_eq!(
            groups,
            [
                rustls::NamedGroup::X25519MLKEM768,
                rustls::NamedGroup::X25519
            ]
        );
    }
}
