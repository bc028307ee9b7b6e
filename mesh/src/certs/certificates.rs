//! What do the users of certificates call?

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use spiffe::SpiffeId;
use tokio::sync::watch;

use super::certificate::Certificate;
use super::renewal_task::{CertificatesConfig, RenewalTask};
use super::source::CertificateSource;
use super::state::{CertificatesState, Shared};
use super::store::{IdentityStatus, Priority};

/// A handle to the certificates of this node's identities. Clones share them.
#[derive(Clone)]
pub struct Certificates(Arc<Shared>);

impl Certificates {
    /// The handle, and the task that issues and renews the certificates.
    pub fn new(
        source: Arc<dyn CertificateSource>,
        config: CertificatesConfig,
    ) -> (Self, RenewalTask) {
        let shared = Arc::new(Shared::new(config.clock.clone()));
        let task = RenewalTask::new(shared.clone(), source, config);
        (Self(shared), task)
    }

    /// Replaces the set of identities of this node. Certificates of new identities are issued at
    /// once. Those of removed identities are dropped, and their keys wiped with the last reference.
    pub fn set_identities(&self, identities: BTreeSet<SpiffeId>) {
        let identities = Arc::new(identities);
        self.0.identities.send_if_modified(|current| {
            let is_modified = **current != *identities;
            *current = identities;
            is_modified
        });
    }

    /// Records that something waits for this identity's certificate. The identity is then requested
    /// about once a second, regardless of earlier failures, and for a waiting connection before all
    /// others. Lasts two seconds; longer waits repeat the call. Has no effect for an identity that
    /// is not on this node.
    pub fn prioritize(&self, identity: &SpiffeId, priority: Priority) {
        if !self.0.identities.borrow().contains(identity) {
            return;
        }
        let mut priorities = self.0.priorities();
        let highest = priorities
            .get(identity)
            .map_or(priority, |other| priority.max(*other));
        priorities.insert(identity.clone(), highest);
        self.0.priority_added.notify_one();
    }

    /// The certificate of an identity, unless it has none or it has expired. Takes no lock.
    pub fn current(&self, identity: &SpiffeId) -> Option<Arc<Certificate>> {
        let state = self.0.state.load();
        let by_identity = |status: &IdentityStatus| status.identity.cmp(identity);
        let found = state.identities.binary_search_by(by_identity).ok()?;
        let certificate = state.identities[found].certificate.as_ref()?;
        self.is_valid(certificate).then(|| certificate.clone())
    }

    /// Whether a certificate has not expired yet. Setting the time of day by up to five minutes
    /// expires no certificate.
    pub fn is_valid(&self, certificate: &Certificate) -> bool {
        !self.0.now().has_expired(certificate)
    }

    /// A snapshot of all certificates and of the trust bundle.
    pub fn state(&self) -> Arc<CertificatesState> {
        self.0.state.load_full()
    }

    /// Notifies of every new, removed or expired certificate, of every failure and of every new
    /// trust bundle. The value is a version number.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.version.subscribe()
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.load();
        let identities = state.identities.iter();
        let identities: Vec<String> = identities.map(|one| one.identity.to_string()).collect();
        f.debug_struct("Certificates")
            .field("identities", &identities)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
