//! A CA whose replies are set by the test.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost_types::value::Kind;
use rcgen::{CertificateSigningRequestParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::ServerConfig;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use spiffe::SpiffeId;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tonic::codegen::Service as _;
use tonic::{Code, Request, Response, Status, async_trait};

use super::super::proto::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use super::super::proto::{IstioCertificateRequest, IstioCertificateResponse};
use super::pem;
use crate::certs::{Authority, IstioCa, IstioCaConfig, Validity};

pub(super) const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

pub(super) fn web() -> SpiffeId {
    WEB.parse().unwrap()
}

/// What the CA does with a request.
#[derive(Clone)]
pub(super) enum Reply {
    /// Signs it.
    Sign,
    Status(Code, String),
    /// Sends this chain.
    Chain(Vec<String>),
    /// Signs with another CA, for another identity, or with other roots.
    SignAs {
        by: Arc<Authority>,
        identity: SpiffeId,
        roots: Vec<CertificateDer<'static>>,
    },
    Hang,
    /// Closes the connection.
    Disconnect,
}

/// A received request.
#[derive(Clone, Debug)]
pub(super) struct ReceivedRequest {
    pub(super) identity: String,
    pub(super) seconds: i64,
    pub(super) authorization: String,
    pub(super) cluster: String,
}

pub(super) struct TestCa {
    folder: TempDir,
    address: SocketAddr,
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

struct Shared {
    authority: Mutex<Arc<Authority>>,
    reply: Mutex<Reply>,
    requests: Mutex<Vec<ReceivedRequest>>,
    disconnects: AtomicBool,
}

pub(super) fn authority() -> Arc<Authority> {
    let folder = tempfile::tempdir().unwrap();
    Arc::new(Authority::create(folder.path()).unwrap())
}

/// The root of another CA.
pub(super) fn root() -> CertificateDer<'static> {
    authority().bundle().roots()[0].clone()
}

/// A leaf of the CA, PEM.
pub(super) fn leaf(ca: &TestCa) -> String {
    let validity = Validity::new(SystemTime::now(), Duration::from_secs(60));
    pem(&ca.authority().issue(&web(), validity).unwrap().chain[0])
}

impl TestCa {
    pub(super) async fn start(reply: Reply) -> Self {
        let mut ca = Self {
            folder: tempfile::tempdir().unwrap(),
            address: "127.0.0.1:0".parse().unwrap(),
            shared: Arc::new(Shared {
                authority: Mutex::new(authority()),
                reply: Mutex::new(reply),
                requests: Mutex::default(),
                disconnects: AtomicBool::new(false),
            }),
            tasks: JoinSet::new(),
        };
        ca.write_token("first");
        ca.write_roots(&[ca.root()]);
        ca.restart().await;
        ca
    }

    pub(super) async fn restart(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        self.tasks.spawn(serve(listener, self.shared.clone()));
    }

    pub(super) async fn stop(&mut self) {
        self.tasks.shutdown().await;
    }

    pub(super) fn replace_authority(&self) {
        *self.shared.authority.lock().unwrap() = authority();
    }

    pub(super) fn set_reply(&self, reply: Reply) {
        *self.shared.reply.lock().unwrap() = reply;
    }

    pub(super) fn requests(&self) -> Vec<ReceivedRequest> {
        self.shared.requests.lock().unwrap().clone()
    }

    pub(super) fn authority(&self) -> Arc<Authority> {
        self.shared.authority.lock().unwrap().clone()
    }

    pub(super) fn root(&self) -> CertificateDer<'static> {
        self.authority().bundle().roots()[0].clone()
    }

    pub(super) fn write_roots(&self, roots: &[CertificateDer<'static>]) {
        let text: String = roots.iter().map(|root| pem(root)).collect();
        fs::write(self.folder.path().join("root.pem"), text).unwrap();
    }

    pub(super) fn write_token(&self, token: &str) {
        fs::write(self.folder.path().join("token"), token).unwrap();
    }

    pub(super) fn config(&self) -> IstioCaConfig {
        let file = |name: &str| self.folder.path().join(name);
        IstioCaConfig::new(self.address.to_string(), file("root.pem"), file("token"))
    }

    pub(super) fn client(&self) -> IstioCa {
        IstioCa::new(self.config()).unwrap()
    }

    pub(super) fn client_with_short_timeout(&self) -> IstioCa {
        IstioCa::new(IstioCaConfig {
            timeout: Duration::from_secs(3),
            ..self.config()
        })
        .unwrap()
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let shared = shared.clone();
        connections.spawn(async move {
            let Ok(stream) = tls(&shared).accept(stream).await else {
                return;
            };
            let reply = shared.clone();
            let service = service_fn(move |request| {
                let mut grpc = IstioCertificateServiceServer::from_arc(reply.clone());
                let shared = reply.clone();
                async move {
                    let response = grpc.call(request).await.unwrap();
                    match shared.disconnects.swap(false, Ordering::Relaxed) {
                        true => Err(io::Error::other("disconnected by the test")),
                        false => Ok(response),
                    }
                }
            });
            let _ = http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn tls(shared: &Shared) -> TlsAcceptor {
    let authority = shared.authority.lock().unwrap().clone();
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let names = vec![
        SanType::IpAddress("127.0.0.1".parse().unwrap()),
        SanType::DnsName("ca.example".try_into().unwrap()),
    ];
    let validity = Validity::new(SystemTime::now(), Duration::from_secs(600));
    let chain = authority.sign_server(&pair, names, validity).unwrap();
    let key = PrivateKeyDer::Pkcs8(pair.serialize_der().into());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

#[async_trait]
impl IstioCertificateService for Shared {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.record(&request);
        let reply = self.reply.lock().unwrap().clone();
        let cert_chain = match reply {
            Reply::Sign => {
                let authority = self.authority.lock().unwrap().clone();
                let roots = authority.bundle().roots().to_vec();
                signed(&request.get_ref().csr, &authority, &web(), &roots)
            }
            Reply::SignAs {
                by,
                identity,
                roots,
            } => signed(&request.get_ref().csr, &by, &identity, &roots),
            Reply::Status(code, message) => return Err(Status::new(code, message)),
            Reply::Chain(chain) => chain,
            Reply::Hang => std::future::pending().await,
            Reply::Disconnect => {
                self.disconnects.store(true, Ordering::Relaxed);
                Vec::new()
            }
        };
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

impl Shared {
    fn record(&self, request: &Request<IstioCertificateRequest>) {
        let header = |name| {
            let value = request.metadata().get(name).unwrap();
            value.to_str().unwrap().to_owned()
        };
        let message = request.get_ref();
        let named = message.metadata.as_ref().unwrap().fields["ImpersonatedIdentity"].clone();
        let Some(Kind::StringValue(identity)) = named.kind else {
            panic!("the request names no identity");
        };
        self.requests.lock().unwrap().push(ReceivedRequest {
            identity,
            seconds: message.validity_duration,
            authorization: header("authorization"),
            cluster: header("clusterid"),
        });
    }
}

fn signed(
    csr: &str,
    authority: &Authority,
    identity: &SpiffeId,
    roots: &[CertificateDer<'static>],
) -> Vec<String> {
    let csr = CertificateSigningRequestParams::from_pem(csr).unwrap();
    let validity = Validity::new(SystemTime::now(), Duration::from_secs(60));
    let chain = authority.sign(&csr.public_key, identity, validity).unwrap();
    chain.iter().chain(roots).map(|der| pem(der)).collect()
}
