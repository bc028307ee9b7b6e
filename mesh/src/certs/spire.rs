//! How are certificates obtained from SPIRE, through the Delegated Identity API of the node's agent?
//!
//! The agent trusts this daemon to name the workloads of the node. The daemon subscribes for exactly
//! the identities whose certificates are requested, by the selectors `k8s:ns` and `k8s:sa`. From a response
//! it takes only the SVID with exactly the requested SPIFFE ID; all others are rejected. The agent
//! pushes rotated SVIDs, which are reported as [`CertificateSource::updates`]. A call of
//! [`CertificateSource::issue`] without an unused SVID sends a new request, so that an agent that is
//! down or hangs is detected, and reported with its reason.
//!
//! Only the bundle of the mesh's own trust domain is trusted. Peers are verified against one flat
//! list of roots, so a root of a federated trust domain in it could sign for the own one.

mod agent;
mod background;
mod backoff;
mod bundles;
mod response;
mod subscription;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use spiffe::{SpiffeId, TrustDomain};
use tokio::sync::{mpsc, watch};

use super::source::{
    CertificateSource, IssueError, IssueFailure, IssueFuture, RunFuture, UpdateCounts,
};
use super::trust_bundle::TrustBundle;
use agent::{Agent, ServiceAccount};
use background::{BackgroundTask, TaskSender};
use bundles::Bundles;
use subscription::{Subscription, Updates};

/// The address of the agent, and the trust domain.
#[derive(Clone, Debug)]
pub struct SpireConfig {
    /// The agent's admin socket (`admin_socket_path` in its configuration).
    pub socket: PathBuf,
    /// The trust domain of the mesh, which is that of SPIRE.
    pub trust_domain: TrustDomain,
}

/// The SPIRE agent of this node, as a source of certificates.
///
/// All background work runs within [`CertificateSource::run`], including the connection to the
/// agent: no request is sent before it is polled, and dropping it ends everything.
pub struct Spire {
    agent: Agent,
    trust_domain: TrustDomain,
    subscriptions: Mutex<BTreeMap<SpiffeId, Subscription>>,
    updates: Arc<Updates>,
    bundles: Bundles,
    tasks: TaskSender,
    /// Taken by the first call of `run`.
    task_queue: Mutex<Option<mpsc::UnboundedReceiver<BackgroundTask>>>,
}

impl Spire {
    /// The source. It connects when it runs.
    pub fn new(config: SpireConfig) -> Self {
        let SpireConfig {
            socket,
            trust_domain,
        } = config;
        let (tasks, task_queue) = mpsc::unbounded_channel();
        Self {
            agent: Agent::new(&socket, tasks.clone()),
            bundles: Bundles::new(trust_domain.clone()),
            trust_domain,
            subscriptions: Mutex::default(),
            updates: Arc::default(),
            tasks,
            task_queue: Mutex::new(Some(task_queue)),
        }
    }

    /// The subscription of an identity. Starts one if there is none.
    fn subscription(&self, identity: &SpiffeId) -> Result<Subscription, IssueError> {
        let mut subscriptions = lock(&self.subscriptions);
        if let Some(subscription) = subscriptions.get(identity) {
            return Ok(subscription.clone());
        }
        let workload = ServiceAccount::of(identity, &self.trust_domain).ok_or_else(|| {
            let domain = &self.trust_domain;
            let message = format!(
                "the identity does not have the form spiffe://{domain}/ns/../sa/..; no request was sent to SPIRE"
            );
            IssueError::new(identity, "spire_not_asked", message)
        })?;
        let (agent, updates) = (self.agent.clone(), self.updates.clone());
        let (subscription, task) = subscription::start(agent, identity.clone(), workload, updates);
        // Fails only after `run` was dropped. Then the subscription is never served, and requests
        // end at their deadline.
        let _ = self.tasks.send(Box::pin(task));
        subscriptions.insert(identity.clone(), subscription.clone());
        Ok(subscription)
    }
}

impl CertificateSource for Spire {
    /// Ignores the requested lifetime: SPIRE's registration entry determines it.
    fn issue<'a>(&'a self, identity: &'a SpiffeId, _ttl: Duration) -> IssueFuture<'a> {
        Box::pin(async move {
            let fail = |failure: IssueFailure| failure.for_identity(identity);
            let svid = self.subscription(identity)?.svid().await.map_err(fail)?;
            self.bundles.wait_until_known().await.map_err(fail)?;
            Ok(svid)
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundles.subscribe()
    }

    fn updates(&self) -> Option<watch::Receiver<UpdateCounts>> {
        Some(self.updates.subscribe())
    }

    fn remove_identity(&self, identity: &SpiffeId) {
        if let Some(subscription) = lock(&self.subscriptions).remove(identity) {
            subscription.end();
        }
        self.updates.remove(identity);
    }

    fn run(&self) -> RunFuture<'_> {
        Box::pin(async move {
            let queue = lock(&self.task_queue).take();
            let Some(mut queue) = queue else {
                return std::future::pending().await;
            };
            let mut tasks = FuturesUnordered::new();
            let bundles = self.bundles.clone().watch(self.agent.clone());
            tasks.push(Box::pin(bundles) as BackgroundTask);
            loop {
                tokio::select! {
                    Some(task) = queue.recv() => tasks.push(task),
                    Some(()) = tasks.next() => {}
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

/// Ignores poisoning: the values are consistent between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
