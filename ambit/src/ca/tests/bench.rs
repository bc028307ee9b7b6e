//! An authority that serves, and callers of every kind.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use http::Uri;
use hyper_util::rt::TokioIo;
use mesh::certs::istio_ca::proto::IstioCertificateRequest;
use mesh::certs::istio_ca::proto::istio_certificate_service_client::IstioCertificateServiceClient;
use mesh::certs::{IstioCa, IstioCaConfig};
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use spiffe::SpiffeId;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::super::*;
use crate::ca::config::Limits;

/// Shorter than what anybody would want, so that tests see every limit.
pub(super) const LIMITS: Limits = Limits {
    min_ttl: Duration::from_secs(10),
    default_ttl: Duration::from_secs(60),
    max_ttl: Duration::from_secs(120),
};

pub(super) struct Bench {
    pub(super) folder: TempDir,
    pub(super) config: CaConfig,
    serving: Option<Running>,
    pub(super) key: TokenKey,
    /// By how many seconds the authority's clock is ahead.
    pub(super) ahead: Arc<AtomicU64>,
}

/// One call; what is not set is as it should be.
#[derive(Default)]
pub(super) struct Ask<'a> {
    pub(super) token: Option<&'a str>,
    pub(super) identity: Option<&'a str>,
    pub(super) csr: Option<String>,
    pub(super) seconds: i64,
}

pub(super) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

pub(super) fn web() -> SpiffeId {
    WEB.parse().unwrap()
}

impl Bench {
    pub(super) async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        create_keys(&path("token.key"), &path("token.pub")).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = CaConfig {
            dir: path("ca"),
            state_dir: path("state"),
            token_key: path("token.pub"),
            audience: "istio-ca".to_owned(),
            trust_domain: "cluster.local".parse().unwrap(),
            names: vec![rcgen::SanType::IpAddress(any.ip())],
            limits: LIMITS,
            listen: any,
            metrics: any,
            readiness: any,
            termination_deadline: Duration::from_secs(5),
            log: LogConfig {
                format: Format::Plain,
                filter: "info".to_owned(),
            },
        };
        let ahead = Arc::<AtomicU64>::default();
        Self {
            serving: Some(start(&config, clock(&ahead)).await.unwrap()),
            key: TokenKey::open(&path("token.key")).unwrap(),
            config,
            folder,
            ahead,
        }
    }

    /// Ends as with SIGTERM.
    pub(super) async fn stop(&mut self) {
        if let Some(running) = self.serving.take() {
            self.config.listen = running.address;
            running.stop().await;
        }
    }

    /// The same folders and the same address, another process.
    pub(super) async fn start_again(&mut self) {
        self.serving = Some(start(&self.config, clock(&self.ahead)).await.unwrap());
    }

    pub(super) async fn restart(&mut self) {
        self.stop().await;
        self.start_again().await;
    }

    pub(super) fn running(&self) -> &Running {
        self.serving.as_ref().unwrap()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn root_file(&self) -> PathBuf {
        self.config.dir.join("root-cert.pem")
    }

    pub(super) fn pass(&self, seconds: u64) {
        self.ahead.fetch_add(seconds, Ordering::Relaxed);
    }

    /// A node's token: for everybody in the namespace `shop`.
    pub(super) fn token(&self) -> String {
        token(&self.key)
    }

    /// The client of the daemon.
    pub(super) fn client(&self) -> IstioCa {
        std::fs::write(self.path("token"), self.token()).unwrap();
        let address = self.running().address.to_string();
        let config = IstioCaConfig::new(address, self.root_file(), self.path("token"));
        IstioCa::new(config).unwrap()
    }

    pub(super) fn channel(&self) -> Channel {
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(self.root_file()).unwrap() {
            roots.add(root.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let connector = Connector {
            address: self.running().address,
            tls: TlsConnector::from(Arc::new(config)),
        };
        Endpoint::from_static("http://ca").connect_with_connector_lazy(connector)
    }

    pub(super) async fn ask(&self, ask: Ask<'_>) -> Result<Vec<String>, Status> {
        call(self.channel(), ask).await
    }

    pub(super) async fn metrics(&self) -> String {
        page(self.running().metrics, "/metrics").await
    }
}

pub(super) fn token(key: &TokenKey) -> String {
    let account = Account::new("istio-system", "ztunnel").unwrap();
    let hours = Duration::from_secs(4 * 3600);
    let claims = Claims::new(&account, "istio-ca", hours, vec!["shop/*".to_owned()]);
    key.sign(&claims).unwrap()
}

/// The body of a page for operators.
pub(super) async fn page(address: SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

pub(super) async fn call(channel: Channel, ask: Ask<'_>) -> Result<Vec<String>, Status> {
    let mut client = IstioCertificateServiceClient::new(channel);
    let answer = client.create_certificate(request(ask)).await?;
    Ok(answer.into_inner().cert_chain)
}

pub(super) fn request(ask: Ask<'_>) -> Request<IstioCertificateRequest> {
    let fields = ask.identity.map(|identity| {
        let value = Value {
            kind: Some(Kind::StringValue(identity.to_owned())),
        };
        [("ImpersonatedIdentity".to_owned(), value)].into()
    });
    let mut request = Request::new(IstioCertificateRequest {
        csr: ask.csr.unwrap_or_else(|| csr(&pair())),
        validity_duration: ask.seconds,
        metadata: fields.map(|fields| Struct { fields }),
    });
    if let Some(token) = ask.token {
        let bearer = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
    }
    request
}

pub(super) fn pair() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

pub(super) fn csr(pair: &KeyPair) -> String {
    let request = CertificateParams::default().serialize_request(pair);
    request.unwrap().pem().unwrap()
}

/// What a command prints, if it succeeds.
pub(super) fn printed(command: &mut Command) -> String {
    let output = command.output().expect("the command is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

fn clock(ahead: &Arc<AtomicU64>) -> mesh::certs::Clock {
    let ahead = ahead.clone();
    Arc::new(move || SystemTime::now() + Duration::from_secs(ahead.load(Ordering::Relaxed)))
}

#[derive(Clone)]
struct Connector {
    address: SocketAddr,
    tls: TlsConnector,
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let stream = TcpStream::connect(this.address).await?;
            let name = ServerName::from(this.address.ip());
            Ok(TokioIo::new(this.tls.connect(name, stream).await?))
        })
    }
}
