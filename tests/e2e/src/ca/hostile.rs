//! A server of Istio's protocol that answers what a test tells it to.

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

use super::answer::{Answer, Authority, asked};
use crate::hostile::{Origin, inside_until};

/// The name in its certificate.
pub const NAME: &str = "ca.test";

/// How long its own certificate is valid.
const OWN_LIFE: Duration = Duration::from_secs(3600);

/// The authority: with files of its root and of a token that it takes from anybody.
pub struct HostileCa {
    files: TempDir,
    shared: Arc<Shared>,
    running: Option<(oneshot::Sender<()>, JoinHandle<Result<()>>)>,
}

struct Shared {
    authority: Authority,
    life: Duration,
    answers: Mutex<Answers>,
}

/// What is answered for whom, and how often each was asked for.
#[derive(Default)]
struct Answers {
    answers: BTreeMap<String, Answer>,
    asked: BTreeMap<String, usize>,
}

impl HostileCa {
    /// Makes its root and its files. The certificates that it signs live for `life`.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn new(life: Duration) -> Result<Self> {
        let files = tempfile::tempdir().context("a folder")?;
        let authority = Authority::new()?;
        std::fs::write(files.path().join("root.pem"), authority.certificate.pem())?;
        std::fs::write(files.path().join("token"), "a token")?;
        let shared = Shared {
            authority,
            life,
            answers: Mutex::default(),
        };
        Ok(Self {
            files,
            shared: Arc::new(shared),
            running: None,
        })
    }

    /// What a daemon is told to use it at this address.
    pub fn daemon_args(&self, at: SocketAddr) -> Vec<String> {
        let file = |name: &str| -> PathBuf { self.files.path().join(name) };
        [
            ("--ca-address", at.to_string()),
            ("--ca-root-cert", file("root.pem").display().to_string()),
            ("--ca-token", file("token").display().to_string()),
            ("--ca-server-name", NAME.to_owned()),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect()
    }

    /// From now on, this is answered for this identity; everybody else gets what is good.
    pub fn answers(&self, identity: &str, answer: Answer) {
        self.shared
            .lock()
            .answers
            .insert(identity.to_owned(), answer);
    }

    /// How often this identity was asked for.
    pub fn asked(&self, identity: &str) -> usize {
        self.shared.lock().asked.get(identity).copied().unwrap_or(0)
    }

    /// Serves in a network namespace, until it is dropped. Returns when it listens.
    ///
    /// # Errors
    /// It cannot listen.
    pub fn serve(&mut self, netns: String, at: SocketAddr) -> Result<()> {
        let (stop, stopped) = oneshot::channel();
        let (ready, listening) = std::sync::mpsc::channel();
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::spawn(move || {
            let origin = Origin {
                netns,
                marked: false,
            };
            inside_until(&origin, async |_| {
                let listener = TcpListener::bind(at).await?;
                let tls = shared.tls()?;
                ready.send(()).context("nobody waits")?;
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

impl Drop for HostileCa {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tls(&self) -> Result<TlsAcceptor> {
        let key = KeyPair::generate()?;
        let name = SanType::DnsName(NAME.try_into()?);
        let leaf = self
            .authority
            .leaf(name, &key, SystemTime::now() + OWN_LIFE)?;
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
        // What happens on one connection is for the daemon to judge.
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
        let identity = asked(&request).unwrap_or_default().to_owned();
        let answer = {
            let mut answers = self.0.lock();
            *answers.asked.entry(identity.clone()).or_default() += 1;
            answers
                .answers
                .get(&identity)
                .copied()
                .unwrap_or(Answer::Good)
        };
        match answer.to(&request, &self.0.authority, self.0.life) {
            Some(answer) => answer.map(Response::new),
            None => std::future::pending().await,
        }
    }
}
