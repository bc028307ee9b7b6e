//! The trust bundle: one stream, for as long as the source runs.

use std::sync::Arc;
use std::time::Duration;

use spiffe::TrustDomain;
use spire_api::pb::spire::api::agent::delegatedidentity::v1::SubscribeToX509BundlesResponse;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::agent::{Agent, Failure};
use super::{TrustBundle, answer, backoff};

/// How long the agent may take for the first bundle, and whoever has an SVID waits for one.
const ANSWER: Duration = Duration::from_secs(5);
/// The bundle is asked for anew this often: a stream of an agent that hangs looks like one of an
/// agent that has no news.
const REFRESH: Duration = Duration::from_secs(300);

/// Whom SPIRE says to trust. Clones share it.
#[derive(Clone)]
pub(super) struct Bundles {
    trust_domain: TrustDomain,
    known: watch::Sender<Arc<TrustBundle>>,
    /// Why the last attempt gave no bundle.
    failure: watch::Sender<Option<Failure>>,
}

impl Bundles {
    pub(super) fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            known: watch::Sender::default(),
            failure: watch::Sender::default(),
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.known.subscribe()
    }

    /// Waits until there is a bundle: without one no SVID can be verified.
    pub(super) async fn known(&self) -> Result<(), Failure> {
        let mut known = self.known.subscribe();
        let waited = timeout(ANSWER, known.wait_for(|bundle| !bundle.is_empty())).await;
        match waited {
            Ok(_) => Ok(()),
            Err(_) => Err(self.failure.borrow().clone().unwrap_or_else(|| {
                Failure::new("bundle_missing", "SPIRE has not sent its bundle yet")
            })),
        }
    }

    /// Follows the agent's bundles. Never returns.
    pub(super) async fn follow(self, agent: Agent) {
        let mut failures = 0;
        loop {
            let ended = self.stream(&agent, &mut failures).await;
            if let Err(failure) = ended {
                failures += 1;
                self.failed(failure);
                sleep(backoff(failures)).await;
            }
        }
    }

    /// Subscribes, and passes on what comes, until it is time to do so anew.
    async fn stream(&self, agent: &Agent, failures: &mut u32) -> Result<(), Failure> {
        let open = async {
            let mut answers = agent.bundles().await?;
            let first = agent.next(answers.message().await)?;
            Ok((answers, first))
        };
        let opened = timeout(ANSWER, open).await;
        let (mut answers, first) = opened.unwrap_or_else(|_| Err(agent.silent(ANSWER)))?;
        *failures = 0;
        self.take(&first);
        let refresh = sleep(REFRESH);
        tokio::pin!(refresh);
        loop {
            tokio::select! {
                message = answers.message() => self.take(&agent.next(message)?),
                () = &mut refresh => return Ok(()),
            }
        }
    }

    /// A bundle that is missing or cannot be read never replaces one that is good.
    fn take(&self, answer: &SubscribeToX509BundlesResponse) {
        let read = answer::bundle(answer, &self.trust_domain);
        let (bundle, federated) = match read {
            Ok(read) => read,
            Err(failure) => return self.failed(failure),
        };
        self.failure.send_replace(None);
        let changed = self.known.send_if_modified(|known| {
            let changed = **known != bundle;
            if changed {
                *known = Arc::new(bundle);
            }
            changed
        });
        if changed {
            let roots = self.known.borrow().roots().len();
            // Federated bundles are named and not trusted.
            info!(target: "mesh::certs", roots, federated = federated.join(","), "trust bundle from SPIRE");
        }
    }

    /// Logged when it changes, not with every attempt.
    fn failed(&self, failure: Failure) {
        let changed = self.failure.send_if_modified(|last| {
            let changed = last.as_ref() != Some(&failure);
            *last = Some(failure.clone());
            changed
        });
        if changed {
            let Failure { code, message } = failure;
            warn!(target: "mesh::certs", code, "no trust bundle from SPIRE: {message}");
        }
    }
}
