//! How one request is served: authenticate the caller, authorize the certificate, issue it; then log
//! and count the outcome.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mesh::certs::istio_ca::proto::istio_certificate_service_server::IstioCertificateService;
use mesh::certs::istio_ca::proto::{IstioCertificateRequest, IstioCertificateResponse};
use spiffe::{SpiffeId, TrustDomain};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status, async_trait};

use super::authentication::Authenticator;
use super::config::TtlLimits;
use super::metrics::Metrics;
use super::refusal::Refusal;
use super::service_account::ServiceAccount;
use super::state::{CaState, IssuedCertificate};
use super::{authorization, csr};

/// Requests processed at a time. A signature takes a core for a fraction of a millisecond; a remote
/// authenticator occupies a permit while it waits.
const MAX_RUNNING: usize = 64;
/// Requests that wait for a permit. A cluster whose nodes all start at once sends thousands.
const MAX_PENDING: usize = 8192;
/// Callers time out by then, and retry.
const DEADLINE: Duration = Duration::from_secs(8);

/// The address that a request comes from, as an extension of the request.
#[derive(Clone, Copy, Debug)]
pub(super) struct PeerAddr(pub(super) SocketAddr);

/// Istio's certificate service.
pub(super) struct Service {
    state: Arc<CaState>,
    authenticator: Arc<dyn Authenticator>,
    trust_domain: TrustDomain,
    ttl_limits: TtlLimits,
    metrics: Metrics,
    running: Semaphore,
    pending: Semaphore,
}

/// What the access log contains of a request, as far as it was processed.
#[derive(Default)]
struct RequestLog {
    caller: Option<ServiceAccount>,
    identity: Option<SpiffeId>,
}

impl Service {
    pub(super) fn new(
        state: Arc<CaState>,
        authenticator: Arc<dyn Authenticator>,
        trust_domain: TrustDomain,
        ttl_limits: TtlLimits,
        metrics: Metrics,
    ) -> Self {
        Self {
            state,
            authenticator,
            trust_domain,
            ttl_limits,
            metrics,
            running: Semaphore::new(MAX_RUNNING),
            pending: Semaphore::new(MAX_PENDING),
        }
    }

    /// Serves a request within the bounds of the service.
    async fn serve(
        &self,
        request: &Request<IstioCertificateRequest>,
        log: &mut RequestLog,
    ) -> Result<IssuedCertificate, Refusal> {
        let overloaded =
            |message: &str| Refusal::new("overloaded", Code::ResourceExhausted, message);
        let _pending = self
            .pending
            .try_acquire()
            .map_err(|_| overloaded("too many requests are pending; try again later"))?;
        let issued = async {
            let permit = self.running.acquire().await;
            let _permit = permit.map_err(|_| overloaded("the authority is stopping"))?;
            self.issue(request, log).await
        };
        timeout(DEADLINE, issued).await.unwrap_or_else(|_| {
            let message = format!("not done within {DEADLINE:?}");
            Err(Refusal::new("deadline", Code::DeadlineExceeded, message))
        })
    }

    async fn issue(
        &self,
        request: &Request<IstioCertificateRequest>,
        log: &mut RequestLog,
    ) -> Result<IssuedCertificate, Refusal> {
        let token = bearer_token(request.metadata());
        let caller = self.authenticator.authenticate(token).await?;
        log.caller = Some(caller.account.clone());
        let request = request.get_ref();
        let metadata = request.metadata.as_ref();
        let identity = authorization::identity(metadata, &caller, &self.trust_domain)?;
        log.identity = Some(identity.clone());
        let ttl = authorization::ttl(request.validity_duration, &self.ttl_limits)?;
        let key = csr::public_key(&request.csr)?;
        self.state.issue(&identity, &key, ttl)
    }

    fn record(
        &self,
        peer: Option<SocketAddr>,
        log: &RequestLog,
        outcome: &Result<IssuedCertificate, Refusal>,
        duration: Duration,
    ) {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let peer = or_dash(peer.map(|peer| peer.to_string()));
        let caller = or_dash(log.caller.as_ref().map(ToString::to_string));
        let identity = or_dash(log.identity.as_ref().map(ToString::to_string));
        let micros = duration.as_micros();
        self.metrics.observe_duration(duration);
        match outcome {
            Ok(issued) => {
                self.metrics.issued.inc();
                let lifetime = issued.not_after.duration_since(self.state.now());
                tracing::info!(
                    target: "access",
                    outcome = "issued", peer, caller, identity, serial = issued.serial,
                    life_seconds = lifetime.unwrap_or_default().as_secs(), micros
                );
            }
            Err(refusal) => {
                self.metrics.record_refusal(refusal.reason);
                tracing::info!(
                    target: "access",
                    outcome = "refused", reason = refusal.reason, peer, caller, identity,
                    message = refusal.message, micros
                );
            }
        }
    }
}

#[async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let start = Instant::now();
        let peer = request.extensions().get::<PeerAddr>().map(|peer| peer.0);
        let mut log = RequestLog::default();
        let outcome = self.serve(&request, &mut log).await;
        self.record(peer, &log, &outcome, start.elapsed());
        match outcome {
            Ok(issued) => Ok(Response::new(IstioCertificateResponse {
                cert_chain: issued.chain,
            })),
            Err(refusal) => Err(Status::from(&refusal)),
        }
    }
}

/// The token of an `authorization: Bearer` header.
fn bearer_token(metadata: &MetadataMap) -> Option<&str> {
    let value = metadata.get("authorization")?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| token.trim())
        .filter(|token| !token.is_empty())
}
