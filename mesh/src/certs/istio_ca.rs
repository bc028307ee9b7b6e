//! Certificates from a service that speaks Istio's protocol: istiod, or `ambit ca`.
//!
//! One gRPC call per certificate, over one TLS connection that is made with the first call and made
//! again whenever it fails. The key is made here and stays here; the authority sees its public half
//! and the name of the identity, and proves itself by a root in a file. Everything that may be
//! replaced while this runs is read when it is used: the token for each call, the roots for each
//! connection.

mod address;
mod answer;
mod connect;
pub mod proto;
mod request;
#[cfg(test)]
mod tests;
mod trust;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls_pki_types::ServerName;
use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::slots::Now;
use super::verify::verify;
use super::{
    CertificateSource, IssueError, IssueFuture, IssuedCertificate, RunFuture, TrustBundle,
};
use address::Address;
use answer::Answer;
use proto::istio_certificate_service_client::IstioCertificateServiceClient;
use request::Asking;
use trust::Trust;

/// Requests and answers are PEM of a few kilobytes; 64 roots and a chain stay well below.
const ANSWER_MOST: usize = 256 * 1024;
/// Of an answer's error message, which goes to the log.
const MESSAGE_MOST: usize = 300;

/// Where the certificate authority is, and how it is trusted and asked.
#[derive(Clone, Debug)]
pub struct IstioCaConfig {
    /// `host:port` or `https://host:port`.
    pub address: String,
    /// PEM file of the roots that the authority's own certificate must chain to; read again for
    /// every connection.
    pub root_cert: PathBuf,
    /// File of the bearer token; read again for every call.
    pub token: PathBuf,
    /// The DNS name or address the authority's certificate must have, if not the host's.
    pub server_name: Option<String>,
    /// Sent as the header `clusterid`.
    pub cluster_id: String,
    /// How long connecting may take, TLS and all.
    pub connect_timeout: Duration,
    /// How long one certificate may take.
    pub timeout: Duration,
}

/// Asks a certificate authority over gRPC.
#[derive(Debug)]
pub struct IstioCa {
    config: IstioCaConfig,
    address: Address,
    server_name: ServerName<'static>,
    trust: Arc<Trust>,
    channel: Mutex<Option<Channel>>,
}

/// Why no client can be made from a configuration.
#[derive(Debug, thiserror::Error)]
pub enum IstioCaError {
    /// The address is not one.
    #[error("{address:?} is not the address of a certificate authority, such as ca.example:15012")]
    Address {
        /// What was given.
        address: String,
    },
    /// The name is not one.
    #[error("{name:?} is neither a DNS name nor an address that a certificate can be for")]
    ServerName {
        /// What was given.
        name: String,
    },
    /// The cluster's name cannot be sent.
    #[error("the cluster id {id:?} cannot be sent as a header")]
    ClusterId {
        /// What was given.
        id: String,
    },
}

impl IstioCaConfig {
    /// The configuration with the defaults for everything but the places.
    pub fn new(
        address: impl Into<String>,
        root_cert: impl Into<PathBuf>,
        token: impl Into<PathBuf>,
    ) -> Self {
        Self {
            address: address.into(),
            root_cert: root_cert.into(),
            token: token.into(),
            server_name: None,
            cluster_id: "Kubernetes".to_owned(),
            connect_timeout: Duration::from_secs(4),
            // Shorter than whoever asks waits, so that what is wrong is still told.
            timeout: Duration::from_secs(8),
        }
    }

    /// All that cannot be understood in it; without any, a client can be made.
    pub fn validation_errors(&self) -> Vec<IstioCaError> {
        let address = Address::parse(&self.address);
        // What the host is good for as a name is not known without one.
        let name = match &address {
            Err(_) if self.server_name.is_none() => None,
            address => Some(self.name(address.as_ref().map_or("", Address::host))),
        };
        let names = name.and_then(Result::err);
        address
            .err()
            .into_iter()
            .chain(names)
            .chain(self.cluster().err())
            .collect()
    }

    fn name(&self, host: &str) -> Result<ServerName<'static>, IstioCaError> {
        let name = self.server_name.as_deref().unwrap_or(host);
        ServerName::try_from(name.to_owned())
            .map_err(|_| IstioCaError::ServerName { name: name.into() })
    }

    fn cluster(&self) -> Result<(), IstioCaError> {
        match request::is_header(&self.cluster_id) {
            true => Ok(()),
            false => Err(IstioCaError::ClusterId {
                id: self.cluster_id.clone(),
            }),
        }
    }
}

impl IstioCa {
    /// A client; connects with the first call.
    ///
    /// # Errors
    /// Fails if the address, the server's name or the cluster's cannot be understood. Files that
    /// cannot be read are no error: they may come later, and until then every call says so.
    pub fn new(config: IstioCaConfig) -> Result<Self, IstioCaError> {
        let address = Address::parse(&config.address)?;
        let server_name = config.name(address.host())?;
        config.cluster()?;
        let trust = Arc::new(Trust::new(config.root_cert.clone()));
        Ok(Self {
            address,
            server_name,
            trust,
            channel: Mutex::default(),
            config,
        })
    }

    async fn ask(
        &self,
        identity: &SpiffeId,
        ttl: Duration,
    ) -> Result<IssuedCertificate, IssueError> {
        let error = |(code, message): Fault| IssueError::new(identity, code, message);
        let asking = Asking::new(identity, ttl).map_err(error)?;
        let answer = self.call(&asking).await.map_err(error)?;
        let Answer { chain, roots } = answer::read(&answer.cert_chain).map_err(error)?;
        let now = Now {
            wall: SystemTime::now(),
            steady: Instant::now(),
        };
        let end = answer::end(&chain, now.wall, ttl);
        let lesson = self
            .trust
            .lesson(&roots, end, now.wall)
            .map_err(|failure| error((GARBAGE, failure.to_string())))?;
        let key = asking.key;
        // Before anything is learned of it: an answer that is refused widens nothing.
        let certificate = verify(
            IssuedCertificate { chain, key },
            identity,
            lesson.bundle(),
            now,
        )?;
        lesson.take();
        Ok(certificate.into())
    }

    /// A connection that was open already may have been closed by the other end just now, which only
    /// a call finds out: then another is made, once.
    async fn call(&self, asking: &Asking) -> Result<proto::IstioCertificateResponse, Fault> {
        let request = || {
            let request = asking.request(&self.config.token, &self.config.cluster_id);
            request.map_err(|message| (IssueError::DENIED, message))
        };
        let (channel, fresh) = self.channel()?;
        let outcome = match call_on(channel, request()?).await {
            Err(status) if !fresh && status.code() == Code::Unavailable => {
                self.disconnect();
                call_on(self.channel()?.0, request()?).await
            }
            outcome => outcome,
        };
        outcome.map_err(|status| {
            if lost(&status) {
                self.disconnect();
            }
            self.explained(&status)
        })
    }

    fn channel(&self) -> Result<(Channel, bool), Fault> {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = &*channel {
            return Ok((open.clone(), false));
        }
        let made = connect::channel(
            &self.address,
            self.server_name.clone(),
            self.trust.clone(),
            self.config.connect_timeout,
        );
        let made = made.map_err(|error| (IssueError::UNREACHABLE, error.to_string()))?;
        *channel = Some(made.clone());
        Ok((made, true))
    }

    /// The next call connects again.
    fn disconnect(&self) {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        *channel = None;
    }

    fn explained(&self, status: &Status) -> Fault {
        let (address, said) = (&self.address, said(status));
        // A status with a cause was made on this side, of a connection that broke.
        let broken = std::error::Error::source(status).is_some();
        match status.code() {
            Code::Internal | Code::Unknown if broken => (
                IssueError::UNREACHABLE,
                format!("the connection to {address} broke: {said}"),
            ),
            Code::Unavailable | Code::Cancelled => (
                IssueError::UNREACHABLE,
                format!("{address} cannot be reached: {said}"),
            ),
            Code::DeadlineExceeded => (
                IssueError::TIMEOUT,
                format!("{address} did not manage in time: {said}"),
            ),
            Code::OutOfRange => (GARBAGE, format!("{address} answers too much: {said}")),
            Code::Unauthenticated
            | Code::PermissionDenied
            | Code::InvalidArgument
            | Code::FailedPrecondition => {
                (IssueError::DENIED, format!("{address} refuses: {said}"))
            }
            code => (FAILED, format!("{address} failed with {code:?}: {said}")),
        }
    }
}

async fn call_on(
    channel: Channel,
    request: Request<proto::IstioCertificateRequest>,
) -> Result<proto::IstioCertificateResponse, Status> {
    let mut client =
        IstioCertificateServiceClient::new(channel).max_decoding_message_size(ANSWER_MOST);
    Ok(client.create_certificate(request).await?.into_inner())
}

/// A stable reason code, and a sentence for the operator.
type Fault = (&'static str, String);

/// What came cannot be understood.
const GARBAGE: &str = "issued_garbage";
/// The authority is there, and could not do it.
const FAILED: &str = "ca_failed";

/// Whether the connection is to be doubted, and not the request.
fn lost(status: &Status) -> bool {
    !matches!(
        status.code(),
        Code::Unauthenticated
            | Code::PermissionDenied
            | Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::ResourceExhausted
    )
}

/// What the other end says, and why the connection failed; in one line, and not endless.
fn said(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let told = error.to_string();
        if !text.contains(&told) {
            text = format!("{text}: {told}");
        }
        cause = error.source();
    }
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MESSAGE_MOST)
        .collect()
}

impl CertificateSource for IstioCa {
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> IssueFuture<'a> {
        Box::pin(async move {
            let limit = self.config.timeout;
            timeout(limit, self.ask(identity, ttl))
                .await
                .unwrap_or_else(|_| {
                    self.disconnect();
                    let message = format!("{} did not answer within {limit:?}", self.address);
                    Err(IssueError::new(identity, IssueError::TIMEOUT, message))
                })
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.trust.bundle()
    }

    fn run(&self) -> RunFuture<'_> {
        Box::pin(self.trust.run())
    }
}
