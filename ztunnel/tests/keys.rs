//! A key is nowhere in memory when the last pod of its identity is gone. Everything that the process
//! may write to is searched for it, so this test has a process of its own.
// A step that fails ends the test with what it expected.
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

/// What is searched for is kept in another form, or it would be found here.
const MASK: u8 = 0xa5;

/// The private number of a P-256 key, masked, in both orders of its bytes: as files have it, and as
/// arithmetic on this processor has it.
struct Secret([Vec<u8>; 2]);

impl Secret {
    /// From PKCS#8, which is wiped.
    fn of(mut key: Vec<u8>) -> Self {
        // ECPrivateKey: version 1, then an octet string of 32 bytes (RFC 5915).
        let head = [2, 1, 1, 4, 32];
        let at = key.windows(5).position(|window| window == head);
        let at = at.expect("a P-256 key") + 5;
        let straight: Vec<u8> = key[at..at + 32].iter().map(|byte| byte ^ MASK).collect();
        key.fill(0);
        let reversed = straight.iter().rev().copied().collect();
        Self([straight, std::hint::black_box(reversed)])
    }

    fn is_at(&self, bytes: &[u8]) -> bool {
        self.0.iter().any(|masked| {
            let pairs = masked.iter().zip(bytes);
            bytes.len() >= masked.len() && pairs.into_iter().all(|(a, b)| *a == *b ^ MASK)
        })
    }

    /// How often it is in the memory of this process.
    fn copies(&self) -> usize {
        let memory = File::open("/proc/self/mem").expect("our own memory");
        let maps = std::fs::read_to_string("/proc/self/maps").expect("our own memory's map");
        let mut buffer = vec![0; 1 << 20];
        let own = buffer.as_ptr() as u64..buffer.as_ptr() as u64 + buffer.len() as u64;
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
                // What the kernel keeps to itself cannot be read, and holds no keys of ours.
                let Ok(read) = memory.read_at(&mut buffer[..wanted], from) else {
                    break;
                };
                copies += (0..read)
                    .filter(|at| !own.contains(&(from + *at as u64)))
                    .filter(|at| self.is_at(&buffer[*at..read]))
                    .count();
                // Pieces overlap by what could lie across their border.
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
async fn a_key_is_nowhere_in_memory_when_the_last_pod_of_its_identity_is_gone() {
    let folder = tempfile::tempdir().expect("a folder");
    let ca = Arc::new(LocalCa::create(folder.path()).expect("an authority"));
    let (certificates, renewal) = Certificates::new(ca, CertificatesConfig::default());
    let identities = Identities::new(certificates, Revocations::none());
    let mut tasks = JoinSet::new();
    tasks.spawn(renewal.run(CancellationToken::new()));
    let following = identities.clone();
    tasks.spawn(async move {
        let telemetry = Telemetry::new(None).expect("metrics");
        following.run(&telemetry, CancellationToken::new()).await;
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
    let secret = Secret::of({
        let mut key = identity.certificate.key();
        let copy = key.secret_der().to_vec();
        zeroize::Zeroize::zeroize(&mut key);
        copy
    });
    drop(identity);
    let living = secret.copies();
    assert!(living > 0, "the search finds what is there");
    identities.set_identities(BTreeSet::new());
    while !identities.state().identities.is_empty() || identities.current(&web).is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "it is forgotten");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Whoever held it last lets it go by itself.
    while secret.copies() > 0 {
        assert!(tokio::time::Instant::now() < deadline, "some of {living}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
