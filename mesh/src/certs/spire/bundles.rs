//! Which roots does SPIRE publish for the trust domain? One stream, for as long as the source runs.

use std::sync::Arc;
use std::time::Duration;

use spiffe::TrustDomain;
use spire_api::pb::spire::api::agent::delegatedidentity::v1::SubscribeToX509BundlesResponse;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::agent::Agent;
use super::backoff::backoff;
use super::response;
use crate::certs::source::IssueFailure;
use crate::certs::trust_bundle::TrustBundle;

/// Deadline for the first bundle of a stream. An SVID waits as long for the first bundle.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The stream is reopened this often, because a stream of a blocked agent looks like one without
/// changes.
const REFRESH_INTERVAL: Duration = Duration::from_secs(300);

/// The bundle of the trust domain. Clones share it.
#[derive(Clone)]
pub(super) struct Bundles {
    trust_domain: TrustDomain,
    bundle: watch::Sender<Arc<TrustBundle>>,
    /// Why the last attempt failed.
    last_failure: watch::Sender<Option<IssueFailure>>,
}

impl Bundles {
    pub(super) fn new(trust_domain: TrustDomain) -> Self {
        Self {
            trust_domain,
            bundle: watch::Sender::default(),
            last_failure: watch::Sender::default(),
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    /// Waits until there is a bundle: without one, no SVID can be verified.
    pub(super) async fn wait_until_known(&self) -> Result<(), IssueFailure> {
        let mut bundle = self.bundle.subscribe();
        let known = bundle.wait_for(|bundle| !bundle.is_empty());
        match timeout(RESPONSE_TIMEOUT, known).await {
            Ok(_) => Ok(()),
            Err(_) => Err(self.last_failure.borrow().clone().unwrap_or_else(|| {
                IssueFailure::new("bundle_missing", "SPIRE has not sent a bundle yet")
            })),
        }
    }

    /// Follows the agent's bundles. Never returns.
    pub(super) async fn watch(self, agent: Agent) {
        let mut failures = 0;
        loop {
            let ended = self.stream(&agent, &mut failures).await;
            if let Err(failure) = ended {
                failures += 1;
                self.record_failure(failure);
                sleep(backoff(failures)).await;
            }
        }
    }

    /// Opens a stream and publishes its bundles, until the stream has to be reopened.
    async fn stream(&self, agent: &Agent, failures: &mut u32) -> Result<(), IssueFailure> {
        let open = async {
            let mut stream = agent.bundles().await?;
            let first = agent.message(stream.message().await)?;
            Ok((stream, first))
        };
        let opened = timeout(RESPONSE_TIMEOUT, open).await;
        let timed_out = |_| Err(agent.timed_out(RESPONSE_TIMEOUT));
        let (mut stream, first) = opened.unwrap_or_else(timed_out)?;
        *failures = 0;
        self.apply(&first);
        let refresh = sleep(REFRESH_INTERVAL);
        tokio::pin!(refresh);
        loop {
            tokio::select! {
                message = stream.message() => self.apply(&agent.message(message)?),
                () = &mut refresh => return Ok(()),
            }
        }
    }

    /// A missing or malformed bundle never replaces a good one.
    fn apply(&self, response: &SubscribeToX509BundlesResponse) {
        let (bundle, federated) = match response::bundle(response, &self.trust_domain) {
            Ok(parsed) => parsed,
            Err(failure) => return self.record_failure(failure),
        };
        self.last_failure.send_replace(None);
        let is_modified = self.bundle.send_if_modified(|current| {
            let is_modified = **current != bundle;
            if is_modified {
                *current = Arc::new(bundle);
            }
            is_modified
        });
        if is_modified {
            let roots = self.bundle.borrow().roots().len();
            info!(
                target: "mesh::certs",
                roots,
                federated = federated.join(","),
                "new trust bundle from SPIRE; federated bundles are not trusted"
            );
        }
    }

    /// Logs a failure that differs from the last one.
    fn record_failure(&self, failure: IssueFailure) {
        let is_new = self.last_failure.send_if_modified(|last| {
            let is_new = last.as_ref() != Some(&failure);
            *last = Some(failure.clone());
            is_new
        });
        if is_new {
            let IssueFailure { code, message } = failure;
            warn!(target: "mesh::certs", code, "no trust bundle from SPIRE: {message}");
        }
    }
}
