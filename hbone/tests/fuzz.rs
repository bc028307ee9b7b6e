//! Fuzz tests of every parser of network input, with mutations of well-formed input.
//!
//! Each target runs for `FUZZ_SECONDS` (2 by default), on the stable toolchain. A run prints its seed; `FUZZ_SEED` repeats
//! it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a panic is how a test fails"
)]

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fastrand::Rng;
use hbone::{
    Accepted, Authority, Baggage, ConnectRequest, Credentials, Forwarded, Peer, Rejected,
    ServeConfig, ServerTls, TraceParent, TunnelService, serve,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use rustls_pki_types::{PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

fn duration_per_target() -> Duration {
    let seconds = std::env::var("FUZZ_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(2))
}

fn rng(target: &str) -> Rng {
    let seed = std::env::var("FUZZ_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("{target}: FUZZ_SEED={seed}");
    Rng::with_seed(seed)
}

/// Applies up to five mutations: bit flips, byte changes, truncation, insertion, repetition, and dictionary words.
fn mutate(rng: &mut Rng, corpus: &[&[u8]], dictionary: &[&[u8]]) -> Vec<u8> {
    let mut bytes = corpus[rng.usize(..corpus.len())].to_vec();
    for _ in 0..rng.usize(..6) {
        let at = rng.usize(..=bytes.len());
        match rng.u8(..6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.u8(..8),
            1 if at < bytes.len() => bytes[at] = rng.u8(..),
            2 => bytes.truncate(at),
            3 => bytes.insert(at, rng.u8(..)),
            4 => {
                let (from, n) = (at.min(bytes.len() / 2), rng.usize(..200));
                let piece: Vec<u8> = bytes[from..].iter().copied().cycle().take(n).collect();
                if !bytes[from..].is_empty() {
                    bytes.splice(at..at, piece);
                }
            }
            _ => {
                let word = dictionary[rng.usize(..dictionary.len())];
                bytes.splice(at..at, word.iter().copied());
            }
        }
    }
    bytes
}

fn text_target(target: &str, corpus: &[&[u8]], dictionary: &[&[u8]], check: impl Fn(&str)) {
    let (mut rng, end) = (rng(target), Instant::now() + duration_per_target());
    while Instant::now() < end {
        for _ in 0..1000 {
            check(&String::from_utf8_lossy(&mutate(
                &mut rng, corpus, dictionary,
            )));
        }
    }
}

#[test]
fn authority_round_trips() {
    let corpus: &[&[u8]] = &[
        b"10.0.0.1:80",
        b"[2001:db8::1]:15008",
        b"web.default.svc:8080",
    ];
    let dictionary: &[&[u8]] = &[
        b":",
        b"[",
        b"]",
        b"%25",
        b"0",
        b"65536",
        b"..",
        b"@",
        b"::ffff:1.2.3.4",
    ];
    text_target("authority", corpus, dictionary, |s| {
        if let Ok(authority) = s.parse::<Authority>() {
            assert_eq!(authority.to_string().parse(), Ok(authority), "{s:?}");
        }
    });
}

#[test]
fn baggage_round_trips() {
    let corpus: &[&[u8]] = &[
        b"k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=web",
        b"service.name=web,service.version=v1,cloud.region=r,cloud.availability_zone=z;p=1",
    ];
    let dictionary: &[&[u8]] = &[
        b",",
        b"=",
        b"%2",
        b"%00",
        b"%C3%A4",
        b";",
        b"k8s.pod.name=",
        b"\xff",
    ];
    text_target("baggage", corpus, dictionary, |s| {
        let baggage = Baggage::parse(s);
        assert_eq!(Baggage::parse(&baggage.to_string()), baggage, "{s:?}");
    });
}

#[test]
fn forwarded_round_trips() {
    let corpus: &[&[u8]] = &[
        b"for=\"10.0.0.1:4711\";host=web.default.svc",
        b"for=\"[::1]:80\"",
    ];
    let dictionary: &[&[u8]] = &[
        b";", b"\"", b"\\\"", b"for=", b"host=", b",", b"=", b"unknown",
    ];
    text_target("forwarded", corpus, dictionary, |s| {
        if let Ok(forwarded) = s.parse::<Forwarded>() {
            assert_eq!(forwarded.to_string().parse(), Ok(forwarded), "{s:?}");
        }
    });
}

#[test]
fn traceparent_round_trips() {
    let corpus: &[&[u8]] = &[b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"];
    let dictionary: &[&[u8]] = &[b"-", b"0000000000000000", b"ff", b"G", "ä".as_bytes()];
    text_target("traceparent", corpus, dictionary, |s| {
        if let Ok(parent) = s.parse::<TraceParent>() {
            assert_eq!(parent.to_string().parse(), Ok(parent), "{s:?}");
        }
    });
}

/// Rejects and counts all requests.
#[derive(Default)]
struct RejectAll(Cell<usize>);

impl TunnelService for RejectAll {
    async fn connect(&self, _: &Peer, _: ConnectRequest) -> Result<Accepted, Rejected> {
        self.0.set(self.0.get() + 1);
        Err(Rejected {
            status: 401,
            reason: "fuzz",
        })
    }
}

struct Target {
    tls: ServerTls,
    client: TlsConnector,
    service: Rc<RejectAll>,
    config: ServeConfig,
}

impl Target {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().der().clone();
        let issuer = Issuer::new(params, key);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![
            SanType::URI("spiffe://td/ns/a/sa/b".try_into().unwrap()),
            SanType::DnsName("fuzz.test".try_into().unwrap()),
        ];
        let leaf = params.signed_by(&key, &issuer).unwrap().der().clone();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![leaf.clone()], key.clone_key())
            .unwrap();
        client.alpn_protocols = vec![b"h2".to_vec()];
        let credentials = Credentials {
            chain: vec![leaf],
            key,
            roots: vec![root],
            revocations: hbone::Revocations::none(),
        };
        // Longer than a handshake on a busy machine. No client reaches it, because each one closes its connection.
        let timeout = Duration::from_secs(10);
        Self {
            tls: ServerTls::new(&credentials).unwrap(),
            client: TlsConnector::from(Arc::new(client)),
            service: Rc::default(),
            config: ServeConfig {
                tls_timeout: timeout,
                h2_timeout: timeout,
                ..ServeConfig::default()
            },
        }
    }

    /// Serves one connection from `client` until it ends.
    async fn serve<F: Future<Output = ()>>(&self, client: impl FnOnce(TcpStream) -> F) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(
            TcpStream::connect(listener.local_addr().unwrap()),
            listener.accept()
        );
        let never = CancellationToken::new();
        let service = Rc::clone(&self.service);
        let serve = serve(
            far.unwrap().0,
            &self.tls,
            service,
            &self.config,
            never.clone(),
            never.clone(),
        );
        let (summary, ()) = tokio::join!(serve, client(near.unwrap()));
        let text = format!("{summary:?}");
        assert!(text.len() < 4096, "the summary is too long: {text}");
    }
}

fn wire_target(target: &str, run: impl AsyncFn(&Target, &mut Rng)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (mut rng, end) = (rng(target), Instant::now() + duration_per_target());
    LocalSet::new().block_on(&runtime, async {
        let target = Target::new();
        while Instant::now() < end {
            run(&target, &mut rng).await;
        }
    });
}

const CLIENT_HELLO: &[u8] = b"\x16\x03\x01\x00\x45\x01\x00\x00\x41\x03\x03\
    01234567890123456789012345678901\x00\x00\x04\x13\x02\x13\x01\x01\x00\x00\x14\
    \x00\x2b\x00\x03\x02\x03\x04\x00\x0a\x00\x04\x00\x02\x11\xec\x00\x10\x00\x05\x00\x03\x02h2";

#[test]
fn bytes_instead_of_tls_never_panic() {
    let corpus: &[&[u8]] = &[
        CLIENT_HELLO,
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x15\x03\x03\0\x02\x02\x28",
        b"\x14\x03\x03\0\x01\x01",
    ];
    let dictionary: &[&[u8]] = &[
        b"\x16\x03\x03",
        b"\x17\x03\x03",
        b"\xff\xff",
        b"\0\0",
        b"\x40\x01",
    ];
    wire_target("bytes instead of TLS", async |target, rng| {
        let bytes = mutate(rng, corpus, dictionary);
        target
            .serve(async |mut tcp| {
                let _refused = tcp.write_all(&bytes).await;
                let _fin = tcp.shutdown().await;
                let _alert = tcp.read_to_end(&mut Vec::new()).await;
            })
            .await;
    });
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

#[test]
fn bytes_instead_of_http2_never_panic() {
    // CONNECT of `a:1` (HPACK: `:method` and `:authority` literal), then DATA, PING, WINDOW_UPDATE, RST_STREAM, GOAWAY.
    let connect = b"\0\0\x0e\x01\x04\0\0\0\x01\x02\x07CONNECT\x01\x03a:1";
    let data = b"\0\0\x01\0\0\0\0\0\x01x";
    let ping = b"\0\0\x08\x06\0\0\0\0\0abcdefgh";
    let window = b"\0\0\x04\x08\0\0\0\0\x01\0\0\xff\xff";
    let reset = b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08";
    let goaway = b"\0\0\x08\x07\0\0\0\0\0\0\0\0\x01\0\0\0\0";
    let plain: Vec<u8> = [&connect[..], data, ping, window, reset, goaway].concat();
    let flood: Vec<u8> = data.repeat(300);
    let corpus: &[&[u8]] = &[connect, &plain, &[&connect[..], &flood].concat(), goaway];
    let dictionary: &[&[u8]] = &[
        connect,
        data,
        ping,
        window,
        reset,
        b"\0\0\0\x09\0\0\0\0\x01",
        b"\0\0\x06\x04\0\0\0\0\0",
        b"\xff\xff\xff",
    ];
    let requests = Cell::new(0);
    wire_target("bytes instead of HTTP/2", async |target, rng| {
        let bytes = mutate(rng, corpus, dictionary);
        target
            .serve(async |tcp| {
                let name = ServerName::try_from("fuzz.test").unwrap();
                let mut tls = target.client.connect(name, tcp).await.unwrap();
                let _refused = tls.write_all(PREFACE).await;
                let _refused = tls.write_all(&bytes).await;
                // A server that reads EOF at once does not process the requests before it.
                let mut response = Vec::new();
                let read = tls.read_to_end(&mut response);
                let _answered = tokio::time::timeout(Duration::from_millis(2), read).await;
                let _fin = tls.shutdown().await;
                let _answer = tls.read_to_end(&mut Vec::new()).await;
            })
            .await;
        requests.set(target.service.0.get());
    });
    assert!(requests.get() > 0, "no mutation reached the service");
}
