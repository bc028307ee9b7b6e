//! A running authority, and its callers.

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

/// Short enough for tests to reach every limit.
pub(super) const TTL_LIMITS: TtlLimits = TtlLimits {
    min: Duration::from_secs(10),
    default: Duration::from_secs(60),
    max: Duration::from_secs(120),
};

pub(super) struct Fixture {
    pub(super) folder: TempDir,
    pub(super) config: CaConfig,
    running: Option<Running>,
    pub(super) signer: TokenSigner,
    /// Seconds that the authority's clock is ahead.
    clock_offset: Arc<AtomicU64>,
}

/// The arguments of one call. By default it has no token, requests no identity, and has a new key.
#[derive(Default)]
pub(super) struct Call<'a> {
    pub(super) token: Option<&'a str>,
    pub(super) identity: Option<&'a str>,
    pub(super) csr: Option<String>,
    pub(super) seconds: i64,
}

pub(super) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

pub(super) fn web() -> SpiffeId {
    WEB.parse().unwrap()
}

impl Fixture {
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
            ttl_limits: TTL_LIMITS,
            listen: any,
            metrics: any,
            readiness: any,
            termination_deadline: Duration::from_secs(5),
            log: LogConfig {
                format: Format::Plain,
                filter: "info".to_owned(),
            },
        };
        let clock_offset = Arc::<AtomicU64>::default();
        Self {
            running: Some(start(&config, clock(&clock_offset)).await.unwrap()),
            signer: TokenSigner::open(&path("token.key")).unwrap(),
            config,
            folder,
            clock_offset,
        }
    }

    /// Stops as on SIGTERM.
    pub(super) async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            self.config.listen = running.address;
            running.stop().await;
        }
    }

    /// Starts with the same folders and the same address.
    pub(super) async fn start_process(&mut self) {
        self.running = Some(
            start(&self.config, clock(&self.clock_offset))
                .await
                .unwrap(),
        );
    }

    pub(super) async fn restart(&mut self) {
        self.stop().await;
        self.start_process().await;
    }

    pub(super) fn running(&self) -> &Running {
        self.running.as_ref().unwrap()
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn root_file(&self) -> PathBuf {
        self.config.dir.join("root-cert.pem")
    }

    pub(super) fn advance_clock(&self, seconds: u64) {
        self.clock_offset.fetch_add(seconds, Ordering::Relaxed);
    }

    /// A node's token, which may impersonate every account in the namespace `shop`.
    pub(super) fn token(&self) -> String {
        token(&self.signer)
    }

    /// The client that ztunnel uses.
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

    pub(super) async fn call(&self, call: Call<'_>) -> Result<Vec<String>, Status> {
        create_certificate(self.channel(), call).await
    }

    pub(super) async fn metrics(&self) -> String {
        page(self.running().metrics, "/metrics").await
    }
}

pub(super) fn token(signer: &TokenSigner) -> String {
    let account = ServiceAccount::new("istio-system", "ztunnel").unwrap();
    let hours = Duration::from_secs(4 * 3600);
    let claims = Claims::new(&account, "istio-ca", hours, vec!["shop/*".to_owned()]);
    signer.sign(&claims).unwrap()
}

/// The response to a GET request, head included.
pub(super) async fn page(address: SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    response
}

/// The certificate chain of a response.
pub(super) async fn create_certificate(
    channel: Channel,
    call: Call<'_>,
) -> Result<Vec<String>, Status> {
    let mut client = IstioCertificateServiceClient::new(channel);
    let response = client.create_certificate(request(call)).await?;
    Ok(response.into_inner().cert_chain)
}

pub(super) fn request(call: Call<'_>) -> Request<IstioCertificateRequest> {
    let fields = call.identity.map(|identity| {
        let value = Value {
            kind: Some(Kind::StringValue(identity.to_owned())),
        };
        [("ImpersonatedIdentity".to_owned(), value)].into()
    });
    let mut request = Request::new(IstioCertificateRequest {
        csr: call.csr.unwrap_or_else(|| csr(&key_pair())),
        validity_duration: call.seconds,
        metadata: fields.map(|fields| Struct { fields }),
    });
    if let Some(token) = call.token {
        let bearer = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", bearer);
    }
    request
}

pub(super) fn key_pair() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

pub(super) fn csr(pair: &KeyPair) -> String {
    let request = CertificateParams::default().serialize_request(pair);
    request.unwrap().pem().unwrap()
}

/// The output of a command that must succeed.
pub(super) fn stdout_of(command: &mut Command) -> String {
    let output = command.output().expect("the command is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

fn clock(offset: &Arc<AtomicU64>) -> mesh::certs::Clock {
    let offset = offset.clone();
    Arc::new(move || SystemTime::now() + Duration::from_secs(offset.load(Ordering::Relaxed)))
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
