//! A fake certificate authority: a server of Istio's protocol whose responses a test sets per identity.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use mesh::certs::istio_ca::proto::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use mesh::certs::istio_ca::proto::{IstioCertificateRequest, IstioCertificateResponse};
use rcgen::{KeyPair, SanType};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::PrivateKeyDer;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status};

use super::response::{CaResponse, SigningCa, requested_identity};
use crate::hostile::{Netns, block_on_in_netns};

/// The DNS name in the server's certificate.
pub const CA_SERVER_NAME: &str = "ca.test";

/// How long the server's own certificate is valid.
const SERVER_CERT_TTL: Duration = Duration::from_secs(3600);

/// A certificate authority that accepts every token. Dropping the value stops the server.
pub struct FakeCa {
    files: TempDir,
    shared: Arc<Shared>,
    running: Option<(oneshot::Sender<()>, JoinHandle<Result<()>>)>,
}

struct Shared {
    authority: SigningCa,
    ttl: Duration,
    responses: Mutex<Responses>,
}

/// The response to each identity, and how often each was requested.
#[derive(Default)]
struct Responses {
    by_identity: BTreeMap<String, CaResponse>,
    requests: BTreeMap<String, usize>,
}

impl FakeCa {
    /// Creates the root, and files with the root and a token. Signed certificates are valid for `ttl`.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn new(ttl: Duration) -> Result<Self> {
        let files = tempfile::tempdir().context("create the CA's folder")?;
        let authority = SigningCa::new()?;
        std::fs::write(files.path().join("root.pem"), authority.certificate.pem())?;
        std::fs::write(files.path().join("token"), "a token")?;
        let shared = Shared {
            authority,
            ttl,
            responses: Mutex::default(),
        };
        Ok(Self {
            files,
            shared: Arc::new(shared),
            running: None,
        })
    }

    /// The daemon arguments that select this authority at an address.
    pub fn daemon_args(&self, at: SocketAddr) -> Vec<String> {
        let file = |name: &str| -> PathBuf { self.files.path().join(name) };
        [
            ("--ca-address", at.to_string()),
            ("--ca-root-cert", file("root.pem").display().to_string()),
            ("--ca-token", file("token").display().to_string()),
            ("--ca-server-name", CA_SERVER_NAME.to_owned()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect()
    }

    /// Sets the response to requests for an identity. Other identities get valid certificates.
    pub fn set_response(&self, identity: &str, response: CaResponse) {
        self.shared
            .lock()
            .by_identity
            .insert(identity.to_owned(), response);
    }

    /// How often a certificate for this identity was requested.
    pub fn request_count(&self, identity: &str) -> usize {
        self.shared
            .lock()
            .requests
            .get(identity)
            .copied()
            .unwrap_or(0)
    }

    /// Serves in a network namespace until the value is dropped. Returns when the port is open.
    ///
    /// # Errors
    /// The port cannot be opened.
    pub fn serve(&mut self, netns: String, at: SocketAddr) -> Result<()> {
        let (stop, stopped) = oneshot::channel();
        let (ready, listening) = std::sync::mpsc::channel();
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::spawn(move || {
            let netns = Netns {
                name: netns,
                is_marked: false,
            };
            block_on_in_netns(&netns, async |_| {
                let listener = TcpListener::bind(at).await?;
                let tls = shared.tls()?;
                ready.send(()).context("the starting thread has ended")?;
                tokio::select! {
                    end = accept(listener, tls, shared) => end,
                    _ = stopped => Ok(()),
                }
            })
        });
        if listening.recv().is_err() {
            let end = thread
                .join()
                .map_err(|_| anyhow!("the authority panicked"))?;
            return end.context("the authority does not listen");
        }
        self.running = Some((stop, thread));
        Ok(())
    }
}

impl Drop for FakeCa {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Responses> {
        self.responses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn tls(&self) -> Result<TlsAcceptor> {
        let key = KeyPair::generate()?;
        let name = SanType::DnsName(CA_SERVER_NAME.try_into()?);
        let leaf = self
            .authority
            .leaf(name, &key, SystemTime::now() + SERVER_CERT_TTL)?;
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config).into())
    }
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, shared: Arc<Shared>) -> Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        // A connection that fails is the daemon's decision, not an error of the server.
        connections.spawn(connection(stream, tls.clone(), Arc::clone(&shared)));
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(stream: TcpStream, tls: TlsAcceptor, shared: Arc<Shared>) -> Result<()> {
    let stream = TokioIo::new(tls.accept(stream).await?);
    let service = TowerToHyperService::new(IstioCertificateServiceServer::new(Service(shared)));
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .serve_connection(stream, service)
        .await
        .context("HTTP/2")
}

struct Service(Arc<Shared>);

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (_, _, request) = request.into_parts();
        let identity = requested_identity(&request).unwrap_or_default().to_owned();
        let response = {
            let mut responses = self.0.lock();
            *responses.requests.entry(identity.clone()).or_default() += 1;
            responses
                .by_identity
                .get(&identity)
                .copied()
                .unwrap_or(CaResponse::Valid)
        };
        match response.to(&request, &self.0.authority, self.0.ttl) {
            Some(result) => result.map(Response::new),
            None => std::future::pending().await,
        }
    }
}
