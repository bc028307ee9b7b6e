//! How is the SVID of one identity requested, pushed and handed over?
//!
//! A stream of responses. It is reopened when it breaks, and when an SVID is requested after the
//! last one was taken.

use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use spire_api::pb::spire::api::agent::delegatedidentity::v1::SubscribeToX509sviDsResponse;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::agent::{Agent, ServiceAccount};
use super::backoff::backoff;
use super::response::svid;
use crate::certs::certificate::IssuedCertificate;
use crate::certs::source::{IssueFailure, UpdateCounts};

/// Deadline for the first response. The agent has it in memory, unless the entry is new and the
/// SPIRE server has to sign.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How many unrequested changes SPIRE has pushed for each identity.
#[derive(Debug, Default)]
pub(super) struct Updates(watch::Sender<UpdateCounts>);

impl Updates {
    pub(super) fn subscribe(&self) -> watch::Receiver<UpdateCounts> {
        self.0.subscribe()
    }

    pub(super) fn remove(&self, identity: &SpiffeId) {
        self.0
            .send_if_modified(|counts| counts.remove(identity).is_some());
    }

    fn increment(&self, identity: &SpiffeId) {
        self.0
            .send_modify(|counts| *counts.entry(identity.clone()).or_default() += 1);
    }
}

/// A handle to the subscription of one identity. Clones share it.
#[derive(Clone)]
pub(super) struct Subscription(Arc<Shared>);

struct Shared {
    /// The number of requests so far.
    requests: watch::Sender<u64>,
    response: watch::Sender<Response>,
    ended: CancellationToken,
}

/// The last response.
#[derive(Default)]
struct Response {
    /// The number of requests when it arrived.
    requests: u64,
    /// An SVID stays here until it is taken, so that its key is in one place only.
    outcome: Option<Result<IssuedCertificate, IssueFailure>>,
}

/// A subscription, and the task that maintains it.
pub(super) fn start(
    agent: Agent,
    identity: SpiffeId,
    workload: ServiceAccount,
    updates: Arc<Updates>,
) -> (Subscription, impl Future<Output = ()> + Send) {
    let (requests, receiver) = watch::channel(0);
    let shared = Arc::new(Shared {
        requests,
        response: watch::Sender::default(),
        ended: CancellationToken::new(),
    });
    let subscriber = Subscriber {
        shared: shared.clone(),
        requests: receiver,
        agent,
        identity,
        workload,
        updates,
        last_leaf: None,
        last_failure: None,
    };
    let ended = shared.ended.clone();
    let task = async move {
        ended.run_until_cancelled_owned(subscriber.run()).await;
    };
    (Subscription(shared), task)
}

impl Subscription {
    /// The last pushed SVID if it was not taken yet, or else the response to a new request.
    pub(super) async fn svid(&self) -> Result<IssuedCertificate, IssueFailure> {
        if let Some(Ok(svid)) = self.take(0) {
            return Ok(svid);
        }
        let mut responses = self.0.response.subscribe();
        loop {
            let mut request = 0;
            self.0.requests.send_modify(|count| {
                *count += 1;
                request = *count;
            });
            let responded = responses.wait_for(|response| response.requests >= request);
            tokio::select! {
                // Cannot fail: `self` holds the sender.
                _ = responded => {}
                () = self.0.ended.cancelled() => {
                    let message = "the identity is no longer on this node";
                    return Err(IssueFailure::new("spire_not_asked", message));
                }
            }
            // A concurrent request may have taken the SVID.
            if let Some(outcome) = self.take(request) {
                return outcome;
            }
        }
    }

    /// Ends the subscription, and wipes the key of an SVID that was not taken.
    pub(super) fn end(&self) {
        self.0.ended.cancel();
        self.0
            .response
            .send_modify(|response| response.outcome = None);
    }

    /// Takes the response to this request or a later one. A failure stays for further calls.
    fn take(&self, request: u64) -> Option<Result<IssuedCertificate, IssueFailure>> {
        let mut taken = None;
        self.0.response.send_if_modified(|response| {
            if response.requests >= request {
                taken = match &response.outcome {
                    Some(Err(failure)) => Some(Err(failure.clone())),
                    _ => response.outcome.take(),
                };
            }
            false
        });
        taken
    }
}

/// The task of a subscription.
struct Subscriber {
    shared: Arc<Shared>,
    requests: watch::Receiver<u64>,
    agent: Agent,
    identity: SpiffeId,
    workload: ServiceAccount,
    updates: Arc<Updates>,
    /// The leaf of the last SVID, so that a repeated one is not counted as an update.
    last_leaf: Option<CertificateDer<'static>>,
    /// The last response, if it was a failure.
    last_failure: Option<IssueFailure>,
}

/// Why a stream is closed.
enum StreamEnd {
    /// A request needs a new response.
    Requested,
    Failed(IssueFailure),
}

type SvidStream = Streaming<SubscribeToX509sviDsResponse>;

impl Subscriber {
    async fn run(mut self) {
        let mut failures = 0;
        loop {
            match self.stream(&mut failures).await {
                StreamEnd::Requested => {}
                StreamEnd::Failed(failure) => {
                    self.publish(Err(failure));
                    failures += 1;
                    tokio::select! {
                        () = sleep(backoff(failures)) => {}
                        () = requested(&mut self.requests) => {}
                    }
                }
            }
        }
    }

    /// Opens a stream, and publishes its responses.
    async fn stream(&mut self, failures: &mut u32) -> StreamEnd {
        let (agent, workload) = (self.agent.clone(), self.workload.clone());
        let mut opening = Box::pin(open(&agent, &workload));
        let opened = match timeout(RESPONSE_TIMEOUT, &mut opening).await {
            Ok(opened) => opened,
            Err(_) => {
                // Waiting requests fail now. A late response is still used, until the next request.
                self.publish(Err(agent.timed_out(RESPONSE_TIMEOUT)));
                tokio::select! {
                    opened = &mut opening => opened,
                    () = requested(&mut self.requests) => return StreamEnd::Requested,
                }
            }
        };
        let (mut stream, mut response) = match opened {
            Ok(opened) => opened,
            Err(failure) => return StreamEnd::Failed(failure),
        };
        *failures = 0;
        loop {
            self.publish(svid(response, &self.identity));
            let message = tokio::select! {
                message = stream.message() => message,
                () = requested(&mut self.requests) => return StreamEnd::Requested,
            };
            response = match agent.message(message) {
                Ok(response) => response,
                Err(failure) => return StreamEnd::Failed(failure),
            };
        }
    }

    /// Publishes an outcome. A new outcome without a request counts as an update.
    fn publish(&mut self, outcome: Result<IssuedCertificate, IssueFailure>) {
        let leaf = outcome.as_ref().ok().and_then(|svid| svid.chain.first());
        let failure = outcome.as_ref().err();
        let is_new = failure != self.last_failure.as_ref()
            || (failure.is_none() && leaf != self.last_leaf.as_ref());
        if let Some(leaf) = leaf {
            self.last_leaf = Some(leaf.clone());
        }
        self.last_failure = failure.cloned();
        let requests = *self.requests.borrow_and_update();
        let mut is_unrequested = false;
        self.shared.response.send_if_modified(|response| {
            is_unrequested = response.requests == requests;
            let is_repeated = is_unrequested && !is_new;
            // An ended subscription holds no key.
            if is_repeated || self.shared.ended.is_cancelled() {
                return false;
            }
            *response = Response {
                requests,
                outcome: Some(outcome),
            };
            true
        });
        if is_unrequested && is_new {
            self.updates.increment(&self.identity);
        }
    }
}

async fn open(
    agent: &Agent,
    workload: &ServiceAccount,
) -> Result<(SvidStream, SubscribeToX509sviDsResponse), IssueFailure> {
    let mut stream = agent.svids(workload).await?;
    let first = agent.message(stream.message().await)?;
    Ok((stream, first))
}

/// Waits for a request.
async fn requested(requests: &mut watch::Receiver<u64>) {
    if requests.changed().await.is_err() {
        // Not reached: the subscriber's `shared` holds the sender.
        std::future::pending::<()>().await;
    }
}
