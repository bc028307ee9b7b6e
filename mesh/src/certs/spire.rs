//! Certificates from SPIRE, by the Delegated Identity API of this node's agent.
//!
//! The agent trusts this daemon to say which workloads run here. So the daemon subscribes for
//! exactly the identities it is asked for, by the selectors `k8s:ns` and `k8s:sa`, and takes from
//! an answer only the SVID that names exactly that identity: whatever else SPIRE would give is
//! refused. The agent pushes rotations, which become [`CertificateSource::rotated`]; and each
//! [`CertificateSource::issue`] that no push has answered yet is a question to the agent, so that an
//! agent that went away or hangs is noticed, with its reason.
//!
//! Of the bundles only that of the own trust domain is trusted. Roots are one flat list to whoever
//! verifies a peer, so a federated trust domain's root among them could sign for this one.

mod agent;
mod answer;
mod bundles;
mod subscription;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use spiffe::{SpiffeId, TrustDomain};
use tokio::sync::{mpsc, watch};

use super::{
    CertificateSource, IssueError, IssueFuture, IssuedCertificate, RunFuture, TrustBundle,
    UpdateCounts,
};
use agent::{Agent, ServiceAccount};
use bundles::Bundles;
use subscription::{Subscription, Turns};

/// Where the agent is, and whom it speaks for.
#[derive(Clone, Debug)]
pub struct SpireConfig {
    /// The agent's admin socket (`admin_socket_path` in its configuration).
    pub socket: PathBuf,
    /// The mesh's own trust domain, which is SPIRE's.
    pub trust_domain: TrustDomain,
}

/// The agent of SPIRE on this node, as a source of certificates.
///
/// All that it does beside answering happens within [`CertificateSource::run`], the connection to
/// the agent included: nothing is asked before that runs, and when it is dropped, nothing is left.
pub struct Spire {
    agent: Agent,
    trust_domain: TrustDomain,
    subscriptions: Mutex<BTreeMap<SpiffeId, Subscription>>,
    turns: Arc<Turns>,
    bundles: Bundles,
    jobs: Jobs,
    /// For whoever runs this, once.
    queue: Mutex<Option<mpsc::UnboundedReceiver<Job>>>,
}

/// Something that [`CertificateSource::run`] is to drive.
type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where jobs are handed in. Not bounded by itself: there is one job for each identity that is
/// wanted here, and few for the connection to the agent.
type Jobs = mpsc::UnboundedSender<Job>;

impl Spire {
    /// The source; connects when it runs.
    pub fn new(config: SpireConfig) -> Self {
        let SpireConfig {
            socket,
            trust_domain,
        } = config;
        let (jobs, queue) = mpsc::unbounded_channel();
        Self {
            agent: Agent::new(&socket, jobs.clone()),
            bundles: Bundles::new(trust_domain.clone()),
            trust_domain,
            subscriptions: Mutex::default(),
            turns: Arc::default(),
            jobs,
            queue: Mutex::new(Some(queue)),
        }
    }

    /// The subscription for an identity, which begins now if there was none.
    fn subscription(&self, identity: &SpiffeId) -> Result<Subscription, IssueError> {
        let mut subscriptions = lock(&self.subscriptions);
        if let Some(subscription) = subscriptions.get(identity) {
            return Ok(subscription.clone());
        }
        let workload = ServiceAccount::of(identity, &self.trust_domain).ok_or_else(|| {
            let domain = &self.trust_domain;
            let message =
                format!("not of the form spiffe://{domain}/ns/../sa/..; SPIRE is not asked");
            IssueError::new(identity, "spire_not_asked", message)
        })?;
        let (agent, turns) = (self.agent.clone(), self.turns.clone());
        let (subscription, following) =
            subscription::begin(agent, identity.clone(), workload, turns);
        // Whoever runs this is gone only together with all that asks.
        let _ = self.jobs.send(Box::pin(following));
        subscriptions.insert(identity.clone(), subscription.clone());
        Ok(subscription)
    }
}

impl CertificateSource for Spire {
    /// Lives as long as SPIRE's entry says, whatever is asked for.
    fn issue<'a>(&'a self, identity: &'a SpiffeId, _ttl: Duration) -> IssueFuture<'a> {
        Box::pin(async move {
            let failed =
                |failure: agent::Failure| IssueError::new(identity, failure.code, failure.message);
            let svid = self.subscription(identity)?.svid().await.map_err(failed)?;
            self.bundles.known().await.map_err(failed)?;
            Ok(IssuedCertificate {
                chain: svid.chain,
                key: svid.key,
            })
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundles.subscribe()
    }

    fn updates(&self) -> Option<watch::Receiver<UpdateCounts>> {
        Some(self.turns.subscribe())
    }

    fn forget(&self, identity: &SpiffeId) {
        if let Some(subscription) = lock(&self.subscriptions).remove(identity) {
            subscription.end();
        }
        self.turns.forget(identity);
    }

    fn run(&self) -> RunFuture<'_> {
        Box::pin(async move {
            let queue = lock(&self.queue).take();
            let Some(mut queue) = queue else {
                return std::future::pending().await;
            };
            let mut jobs = FuturesUnordered::new();
            jobs.push(Box::pin(self.bundles.clone().follow(self.agent.clone())) as Job);
            loop {
                tokio::select! {
                    Some(job) = queue.recv() => jobs.push(job),
                    Some(()) = jobs.next() => {}
                }
            }
        })
    }
}

impl fmt::Debug for Spire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spire")
            .field("agent", &self.agent)
            .field("trust_domain", &self.trust_domain)
            .field("subscriptions", &lock(&self.subscriptions).len())
            .finish_non_exhaustive()
    }
}

/// What is behind these locks is whole between any two statements, whoever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pause before the agent is tried again after so many failures in a row. It is a process of
/// this machine: trying costs one system call, and its return should be noticed soon.
fn backoff(failures: u32) -> Duration {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(5);
    let doubled = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(LONGEST).mul_f64(0.8 + 0.4 * fastrand::f64())
}

#[cfg(test)]
mod tests;
