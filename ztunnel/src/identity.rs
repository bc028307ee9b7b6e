//! The TLS configurations of this node's identities: built once per certificate, read by the
//! workers without a lock.

use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hbone::{ClientTls, Credentials, Revocations, ServerTls};
use mesh::certs::{
    Certificate, Certificates, CertificatesState, IdentityState, Priority, TrustBundle,
};
use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::{interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::telemetry::Telemetry;

/// How long a connection waits for the first certificate of its pod's identity. A certificate is
/// issued when the pod is enrolled, before its applications start. If there is none after this
/// time, the certificate authority is most likely down.
const CERTIFICATE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a waiting connection or pod renews its request. Certificates without a waiter are
/// requested less often.
const REQUEST_INTERVAL: Duration = Duration::from_secs(1);
/// TLS configurations built before the task yields. A new trust bundle rebuilds that of every
/// identity, and each takes 0.1 ms.
const BUILDS_PER_YIELD: usize = 32;

/// The TLS configurations of one identity.
pub struct Identity {
    /// For tunnels that this node opens.
    pub client: ClientTls,
    /// For tunnels that this node accepts.
    pub server: ServerTls,
    /// The certificate that they present.
    pub certificate: Arc<Certificate>,
    /// The roots that they trust.
    pub bundle: Arc<TrustBundle>,
}

impl Identity {
    /// Whether it was built from this certificate and bundle.
    fn is_built_from(&self, certificate: &Arc<Certificate>, bundle: &Arc<TrustBundle>) -> bool {
        Arc::ptr_eq(&self.certificate, certificate) && Arc::ptr_eq(&self.bundle, bundle)
    }
}

/// Why an identity has no usable certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No certificate has been issued yet.
    #[error(
        "no certificate has been issued for its identity yet; is the certificate authority reachable?"
    )]
    Pending,
    /// The last certificate has expired and was not renewed.
    #[error("the certificate of its identity has expired and was not renewed")]
    Expired,
}

impl IdentityError {
    /// Stable reason code.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Pending => "cert_pending",
            Self::Expired => "certificate_expired",
        }
    }
}

/// The identities of this node. Clones share their state.
#[derive(Clone)]
pub struct Identities(Arc<Inner>);

struct Inner {
    certificates: Certificates,
    revocations: Revocations,
    ready: ArcSwap<Ready>,
    changed: watch::Sender<()>,
}

/// The current TLS of each identity, or `Expired`. An identity without an entry has never had a
/// certificate.
type Ready = HashMap<SpiffeId, Result<Arc<Identity>, IdentityError>>;

impl Identities {
    /// Creates an empty set. Certificates come from `certificates`; TLS rejects peers whose
    /// certificate is in `revocations`.
    pub fn new(certificates: Certificates, revocations: Revocations) -> Self {
        let (ready, changed) = (ArcSwap::default(), watch::Sender::new(()));
        Self(Arc::new(Inner {
            certificates,
            revocations,
            ready,
            changed,
        }))
    }

    /// Sets the identities that run on this node. Certificates and keys of others are dropped.
    pub fn set_identities(&self, identities: BTreeSet<SpiffeId>) {
        self.0.certificates.set_identities(identities);
    }

    /// Rebuilds TLS when certificates or the trust bundle change, until cancelled.
    pub async fn run(&self, telemetry: &Telemetry, stop: CancellationToken) {
        let mut certificates = self.0.certificates.subscribe();
        loop {
            certificates.borrow_and_update();
            self.rebuild(telemetry).await;
            tokio::select! {
                () = stop.cancelled() => return,
                changed = certificates.changed() => if changed.is_err() { return },
            }
        }
    }

    /// The TLS of an identity, without waiting.
    ///
    /// # Errors
    /// Fails if it has no valid certificate.
    pub fn current(&self, identity: &SpiffeId) -> Result<Arc<Identity>, IdentityError> {
        let ready = self.0.ready.load();
        let found = ready.get(identity).ok_or(IdentityError::Pending)?;
        let found = found.as_ref().map_err(|error| *error)?;
        if !self.0.certificates.is_valid(&found.certificate) {
            return Err(IdentityError::Expired);
        }
        Ok(found.clone())
    }

    /// The TLS of an identity, for a connection. Waits up to [`CERTIFICATE_TIMEOUT`] for a
    /// certificate, which is requested with the highest priority.
    pub(crate) async fn ready(&self, identity: &SpiffeId) -> Result<Arc<Identity>, IdentityError> {
        self.wait_for(identity, Priority::Connection).await
    }

    /// The TLS of an identity, for a pod that is being enrolled. Waits like [`Self::ready`], with a
    /// lower priority.
    pub(crate) async fn ready_for_pod(
        &self,
        identity: &SpiffeId,
    ) -> Result<Arc<Identity>, IdentityError> {
        self.wait_for(identity, Priority::Pod).await
    }

    async fn wait_for(
        &self,
        identity: &SpiffeId,
        priority: Priority,
    ) -> Result<Arc<Identity>, IdentityError> {
        let found = self.current(identity);
        if found.is_ok() {
            return found;
        }
        // Boxed: most calls return above and need not carry the state of the wait.
        let wait = Box::pin(self.wait(identity, priority));
        timeout(CERTIFICATE_TIMEOUT, wait)
            .await
            .unwrap_or_else(|_| self.current(identity))
    }

    async fn wait(
        &self,
        identity: &SpiffeId,
        priority: Priority,
    ) -> Result<Arc<Identity>, IdentityError> {
        let mut changed = self.0.changed.subscribe();
        let mut request = interval(REQUEST_INTERVAL);
        loop {
            changed.borrow_and_update();
            let found = self.current(identity);
            if found.is_ok() {
                return found;
            }
            tokio::select! {
                _ = request.tick() => self.0.certificates.prioritize(identity, priority),
                changed = changed.changed() => if changed.is_err() { return found },
            }
        }
    }

    /// The state of all certificates, for the admin page.
    pub fn state(&self) -> Arc<CertificatesState> {
        self.0.certificates.state()
    }

    /// Builds TLS for every new certificate, or for all if the bundle is new.
    async fn rebuild(&self, telemetry: &Telemetry) {
        let (before, state) = (self.0.ready.load_full(), self.0.certificates.state());
        let mut after = Ready::with_capacity(state.identities.len());
        let mut builds = 0_usize;
        for status in &state.identities {
            let identity = &status.identity;
            let old = before.get(identity).and_then(|old| old.as_ref().ok());
            let Some(certificate) = &status.certificate else {
                if let IdentityState::Expired { at } = status.state {
                    // Alerts on this metric must also cover certificates that have expired.
                    telemetry.record_certificate_expiry(identity, Some(at));
                    after.insert(identity.clone(), Err(IdentityError::Expired));
                }
                continue;
            };
            if let Some(old) = old.filter(|old| old.is_built_from(certificate, &state.bundle)) {
                after.insert(identity.clone(), Ok(old.clone()));
                continue;
            }
            let built = self.build(certificate, &state.bundle);
            // If the new certificate is unusable, keep the old one, which still works.
            if let Some(built) = built.or_else(|| old.cloned()) {
                telemetry.record_certificate_expiry(identity, Some(built.certificate.not_after));
                after.insert(identity.clone(), Ok(built));
            }
            builds += 1;
            if builds.is_multiple_of(BUILDS_PER_YIELD) {
                yield_now().await;
            }
        }
        for identity in before.keys().filter(|one| !after.contains_key(one)) {
            telemetry.record_certificate_expiry(identity, None);
        }
        telemetry.record_certificates(&state);
        self.0.ready.store(Arc::new(after));
        self.0.changed.send_replace(());
    }

    fn build(
        &self,
        certificate: &Arc<Certificate>,
        bundle: &Arc<TrustBundle>,
    ) -> Option<Arc<Identity>> {
        let credentials = Credentials {
            chain: certificate.chain.clone(),
            key: certificate.key(),
            roots: bundle.roots().to_vec(),
            revocations: self.0.revocations.clone(),
        };
        let tls = ClientTls::new(&credentials)
            .and_then(|client| Ok((client, ServerTls::new(&credentials)?)));
        match tls {
            Ok((client, server)) => Some(Arc::new(Identity {
                client,
                server,
                certificate: certificate.clone(),
                bundle: bundle.clone(),
            })),
            Err(error) => {
                let identity = &certificate.identity;
                tracing::error!(
                    %identity,
                    error = &error as &dyn Error,
                    "cannot use a new certificate: the old one is kept while it is valid"
                );
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;
