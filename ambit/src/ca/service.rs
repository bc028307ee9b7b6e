//! One request: who asks, for whom, with which key; signed or refused, and told.

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

use super::account::Account;
use super::authenticate::Authenticator;
use super::config::Limits;
use super::decide;
use super::keeper::{Keeper, Signed};
use super::metrics::Metrics;
use super::refusal::Refusal;

/// Requests that are worked on at a time. Signing takes a core for a fraction of a millisecond;
/// authenticators that ask somebody else take a place here while they wait.
const RUNNING: usize = 64;
/// Requests that wait for their turn. A cluster whose nodes all start at once has thousands.
const WAITING: usize = 8192;
/// Callers have given up by then, and would ask again.
const DEADLINE: Duration = Duration::from_secs(8);

/// Where a request comes from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) SocketAddr);

/// Istio's certificate service.
pub(super) struct Service {
    keeper: Arc<Keeper>,
    authenticator: Arc<dyn Authenticator>,
    trust_domain: TrustDomain,
    limits: Limits,
    metrics: Metrics,
    running: Semaphore,
    waiting: Semaphore,
}

/// What is known of a request, for its line in the log.
#[derive(Default)]
struct Known {
    caller: Option<Account>,
    identity: Option<SpiffeId>,
}

impl Service {
    pub(super) fn new(
        keeper: Arc<Keeper>,
        authenticator: Arc<dyn Authenticator>,
        trust_domain: TrustDomain,
        limits: Limits,
        metrics: Metrics,
    ) -> Self {
        Self {
            keeper,
            authenticator,
            trust_domain,
            limits,
            metrics,
            running: Semaphore::new(RUNNING),
            waiting: Semaphore::new(WAITING),
        }
    }

    async fn decided(
        &self,
        request: &Request<IstioCertificateRequest>,
        known: &mut Known,
    ) -> Result<Signed, Refusal> {
        let busy = |message: &str| Refusal::new("overloaded", Code::ResourceExhausted, message);
        let _waits = self
            .waiting
            .try_acquire()
            .map_err(|_| busy("too many requests wait; try again later"))?;
        let work = async {
            let turn = self.running.acquire().await;
            let _turn = turn.map_err(|_| busy("the authority is stopping"))?;
            self.signed(request, known).await
        };
        timeout(DEADLINE, work).await.unwrap_or_else(|_| {
            let message = format!("not done within {DEADLINE:?}");
            Err(Refusal::new("deadline", Code::DeadlineExceeded, message))
        })
    }

    async fn signed(
        &self,
        request: &Request<IstioCertificateRequest>,
        known: &mut Known,
    ) -> Result<Signed, Refusal> {
        let token = bearer(request.metadata());
        let caller = self.authenticator.authenticate(token).await?;
        known.caller = Some(caller.account.clone());
        let asked = request.get_ref();
        let identity = decide::identity(asked.metadata.as_ref(), &caller, &self.trust_domain)?;
        known.identity = Some(identity.clone());
        let ttl = decide::ttl(asked.validity_duration, &self.limits)?;
        let key = decide::key(&asked.csr)?;
        self.keeper.sign(&identity, &key, ttl)
    }

    fn tell(
        &self,
        peer: Option<SocketAddr>,
        known: &Known,
        outcome: &Result<Signed, Refusal>,
        took: Duration,
    ) {
        let shown = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let peer = shown(peer.map(|peer| peer.to_string()));
        let caller = shown(known.caller.as_ref().map(ToString::to_string));
        let identity = shown(known.identity.as_ref().map(ToString::to_string));
        let micros = took.as_micros();
        self.metrics.took(took);
        match outcome {
            Ok(signed) => {
                self.metrics.issued.inc();
                let life = signed.not_after.duration_since(self.keeper.now());
                tracing::info!(
                    target: "access",
                    outcome = "issued", peer, caller, identity, serial = signed.serial,
                    life_seconds = life.unwrap_or_default().as_secs(), micros
                );
            }
            Err(refusal) => {
                self.metrics.refused(refusal.reason);
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
        let began = Instant::now();
        let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
        let mut known = Known::default();
        let outcome = self.decided(&request, &mut known).await;
        self.tell(peer, &known, &outcome, began.elapsed());
        match outcome {
            Ok(signed) => Ok(Response::new(IstioCertificateResponse {
                cert_chain: signed.chain,
            })),
            Err(refusal) => Err(Status::from(&refusal)),
        }
    }
}

/// The token of an `authorization: Bearer` header.
fn bearer(metadata: &MetadataMap) -> Option<&str> {
    let value = metadata.get("authorization")?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| token.trim())
        .filter(|token| !token.is_empty())
}
