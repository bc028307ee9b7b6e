//! A private key is wiped from memory when the last pod of its identity is gone. The test searches
//! all writable memory of its process, and therefore has a process of its own.
#![allow(clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use hbone::Revocations;
use mesh::certs::{Certificates, CertificatesConfig, LocalCa};
use spiffe::SpiffeId;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use ztunnel::identity::Identities;
use ztunnel::telemetry::Telemetry;

/// Masks the searched bytes, so that the search does not find its own copy.
const MASK: u8 = 0xa5;

/// The private scalar of a P-256 key, masked, in both byte orders: big-endian as in files, and
/// little-endian as in arithmetic on this processor.
struct MaskedKey([Vec<u8>; 2]);

impl MaskedKey {
    /// Extracts the scalar from PKCS#8, and wipes that.
    fn from_pkcs8(mut key: Vec<u8>) -> Self {
        // ECPrivateKey: version 1, then an octet string of 32 bytes (RFC 5915).
        let header = [2, 1, 1, 4, 32];
        let at = key.windows(5).position(|window| window == header);
        let at = at.expect("a P-256 key") + 5;
        let big_endian: Vec<u8> = key[at..at + 32].iter().map(|byte| byte ^ MASK).collect();
        key.fill(0);
        let little_endian = big_endian.iter().rev().copied().collect();
        Self([big_endian, std::hint::black_box(little_endian)])
    }

    /// Whether the key is at the start of `bytes`.
    fn is_prefix_of(&self, bytes: &[u8]) -> bool {
        self.0.iter().any(|masked| {
            let pairs = masked.iter().zip(bytes);
            bytes.len() >= masked.len() && pairs.into_iter().all(|(a, b)| *a == *b ^ MASK)
        })
    }

    /// Number of copies in the writable memory of this process.
    fn copies(&self) -> usize {
        let memory = File::open("/proc/self/mem").expect("our own memory");
        let maps = std::fs::read_to_string("/proc/self/maps").expect("our own memory's map");
        let mut buffer = vec![0; 1 << 20];
        let own_buffer = buffer.as_ptr() as u64..buffer.as_ptr() as u64 + buffer.len() as u64;
        let mut copies = 0;
        for line in maps.lines() {
            let mut words = line.split([' ', '-']);
            let mut address = || u64::from_str_radix(words.next().unwrap_or(""), 16);
            let (Ok(mut from), Ok(to)) = (address(), address()) else {
                continue;
            };
            if !words.next().is_some_and(|rights| rights.starts_with("rw")) {
                continue;
            }
            while from < to {
                let wanted = usize::try_from(to - from).unwrap_or(usize::MAX);
                let wanted = wanted.min(buffer.len());
                // Mappings of the kernel cannot be read and hold no keys.
                let Ok(read) = memory.read_at(&mut buffer[..wanted], from) else {
                    break;
                };
                copies += (0..read)
                    .filter(|at| !own_buffer.contains(&(from + *at as u64)))
                    .filter(|at| self.is_prefix_of(&buffer[*at..read]))
                    .count();
                // Reads overlap, so that a key across their border is found.
                from += if read < wanted || from + read as u64 == to {
                    read
                } else {
                    read - 31
                } as u64;
                if read == 0 {
                    break;
                }
            }
        }
        buffer.fill(0);
        std::hint::black_box(&buffer);
        copies
    }
}

#[tokio::test]
async fn key_is_wiped_when_its_identity_is_removed() {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Arc::new(LocalCa::create(folder.path()).expect("an authority"));
    let (certificates, renewal) = Certificates::new(ca, CertificatesConfig::default());
    let identities = Identities::new(certificates, Revocations::none());
    let mut tasks = JoinSet::new();
    tasks.spawn(renewal.run(CancellationToken::new()));
    let running = identities.clone();
    tasks.spawn(async move {
        let telemetry = Telemetry::new(None).expect("metrics");
        running.run(&telemetry, CancellationToken::new()).await;
    });
    let web = SpiffeId::new("spiffe://cluster.local/ns/shop/sa/web").expect("an identity");
    identities.set_identities(BTreeSet::from([web.clone()]));
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let identity = loop {
        match identities.current(&web) {
            Ok(identity) => break identity,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let key = MaskedKey::from_pkcs8({
        let mut der = identity.certificate.key();
        let copy = der.secret_der().to_vec();
        zeroize::Zeroize::zeroize(&mut der);
        copy
    });
    drop(identity);
    let copies = key.copies();
    assert!(copies > 0, "the search finds a key in use");
    identities.set_identities(BTreeSet::new());
    while !identities.state().identities.is_empty() || identities.current(&web).is_ok() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the identity is not removed"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The last owner may drop it a moment later.
    while key.copies() > 0 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "copies of the key remain ({copies} while in use)"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
