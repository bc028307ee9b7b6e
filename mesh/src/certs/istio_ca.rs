//! How are certificates requested from a CA with Istio's CSR protocol: istiod, or `ambit ca`?
//!
//! One gRPC call per certificate. All calls share one TLS connection, which is opened by the first
//! call and reopened after a failure. The private key is generated here and never sent: the CA
//! receives the public key and the name of the identity. The CA's own certificate is verified
//! against the roots of a file. The token is read for each call and the roots for each connection,
//! so both can be replaced at runtime.

mod address;
mod call_error;
mod config;
mod connect;
pub mod proto;
mod request;
mod response;
mod root_store;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls_pki_types::ServerName;
use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::certificate::IssuedCertificate;
use super::clock::Now;
use super::source::{CertificateSource, IssueError, IssueFailure, IssueFuture, RunFuture};
use super::trust_bundle::TrustBundle;
use super::verify_response::verify_response;
use address::Address;
use proto::istio_certificate_service_client::IstioCertificateServiceClient;
use request::CsrRequest;
use response::Response;
use root_store::RootStore;

pub use config::{IstioCaConfig, IstioCaError};

/// Requests and responses are PEM of a few kilobytes. 64 roots and a chain are well below this.
const MAX_RESPONSE_BYTES: usize = 256 * 1024;

/// A client of a CA with Istio's CSR protocol.
#[derive(Debug)]
pub struct IstioCa {
    config: IstioCaConfig,
    address: Address,
    server_name: ServerName<'static>,
    roots: Arc<RootStore>,
    channel: Mutex<Option<Channel>>,
}

impl IstioCa {
    /// A client. The first call connects.
    ///
    /// # Errors
    /// Fails if the address, the server name or the cluster id is not valid. A file that cannot be
    /// read is no error here: it may be created later. Until then every call fails.
    pub fn new(config: IstioCaConfig) -> Result<Self, IstioCaError> {
        let address = config.parse_address()?;
        let server_name = config.parse_server_name(address.host())?;
        config.check_cluster_id()?;
        let roots = Arc::new(RootStore::new(config.root_cert.clone()));
        Ok(Self {
            address,
            server_name,
            roots,
            channel: Mutex::default(),
            config,
        })
    }

    /// Requests a certificate, and verifies the response before its roots are stored: a rejected
    /// response adds no root.
    async fn request(
        &self,
        identity: &SpiffeId,
        ttl: Duration,
    ) -> Result<IssuedCertificate, IssueError> {
        let fail = |failure: IssueFailure| failure.for_identity(identity);
        let request = CsrRequest::new(identity, ttl).map_err(fail)?;
        let response = self.call(&request).await.map_err(fail)?;
        let Response { chain, roots } = response::parse(&response.cert_chain).map_err(fail)?;
        let now = Now {
            wall: SystemTime::now(),
            monotonic: Instant::now(),
        };
        let expiry = response::expiry(&chain, now.wall, ttl);
        let pending = self
            .roots
            .prepare(&roots, expiry, now.wall)
            .map_err(|error| fail(IssueFailure::malformed(error.to_string())))?;
        let key = request.key;
        let issued = IssuedCertificate { chain, key };
        let certificate = verify_response(issued, identity, pending.bundle(), now)?;
        pending.commit();
        Ok(certificate.into())
    }

    /// Sends the request. If an existing connection turns out to be closed by the CA, sends it once
    /// more on a new connection: only a call detects that.
    async fn call(
        &self,
        request: &CsrRequest,
    ) -> Result<proto::IstioCertificateResponse, IssueFailure> {
        let message = || {
            let message = request.message(&self.config.token, &self.config.cluster_id);
            message.map_err(|error| IssueFailure::new(IssueError::DENIED, error))
        };
        let (channel, is_new) = self.channel()?;
        let outcome = match call_on(channel, message()?).await {
            Err(status) if !is_new && status.code() == Code::Unavailable => {
                self.disconnect();
                call_on(self.channel()?.0, message()?).await
            }
            outcome => outcome,
        };
        outcome.map_err(|status| {
            if call_error::is_connection_suspect(&status) {
                self.disconnect();
            }
            call_error::failure(&status, &self.address)
        })
    }

    /// The current channel, or a new one. The flag is true for a new one.
    fn channel(&self) -> Result<(Channel, bool), IssueFailure> {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(current) = &*channel {
            return Ok((current.clone(), false));
        }
        let new = connect::channel(
            &self.address,
            self.server_name.clone(),
            self.roots.clone(),
            self.config.connect_timeout,
        );
        let new =
            new.map_err(|error| IssueFailure::new(IssueError::UNREACHABLE, error.to_string()))?;
        *channel = Some(new.clone());
        Ok((new, true))
    }

    /// Drops the channel, so that the next call connects again.
    fn disconnect(&self) {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        *channel = None;
    }
}

async fn call_on(
    channel: Channel,
    request: Request<proto::IstioCertificateRequest>,
) -> Result<proto::IstioCertificateResponse, Status> {
    let mut client =
        IstioCertificateServiceClient::new(channel).max_decoding_message_size(MAX_RESPONSE_BYTES);
    Ok(client.create_certificate(request).await?.into_inner())
}

impl CertificateSource for IstioCa {
    fn issue<'a>(&'a self, identity: &'a SpiffeId, ttl: Duration) -> IssueFuture<'a> {
        Box::pin(async move {
            let limit = self.config.timeout;
            timeout(limit, self.request(identity, ttl))
                .await
                .unwrap_or_else(|_| {
                    self.disconnect();
                    let message = format!("{} did not respond within {limit:?}", self.address);
                    Err(IssueError::new(identity, IssueError::TIMEOUT, message))
                })
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.roots.bundle()
    }

    fn run(&self) -> RunFuture<'_> {
        Box::pin(self.roots.watch_file())
    }
}
