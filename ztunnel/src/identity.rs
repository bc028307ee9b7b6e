//! The identities of this node's pods, ready to use: TLS built once per certificate, read by the
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

/// How long a connection waits for the first certificate of its pod's identity. One is issued when
/// the pod is enrolled, before its applications start, so whoever still waits after this waits for
/// a certificate authority that is down.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(5);
/// How often it says that it waits; certificates that nobody waits for are not asked for as often.
const AGAIN: Duration = Duration::from_secs(1);
/// TLS configurations that are built before others get their turn: a new trust bundle means one for
/// every identity, a tenth of a millisecond each.
const BUILDS: usize = 32;

/// One identity with the TLS configurations that speak for it.
pub struct Identity {
    /// For tunnels that this node opens.
    pub client: ClientTls,
    /// For tunnels that this node accepts.
    pub server: ServerTls,
    /// What they were made from: the certificate,
    pub certificate: Arc<Certificate>,
    /// and whom to trust.
    pub bundle: Arc<TrustBundle>,
}

impl Identity {
    /// Whether it was made from these.
    fn is_of(&self, certificate: &Arc<Certificate>, bundle: &Arc<TrustBundle>) -> bool {
        Arc::ptr_eq(&self.certificate, certificate) && Arc::ptr_eq(&self.bundle, bundle)
    }
}

/// Why a pod cannot prove who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No certificate has been issued yet.
    #[error(
        "no certificate has been issued for its identity yet; is the certificate authority reachable?"
    )]
    Pending,
    /// The last certificate has expired and no other came.
    #[error("the certificate of its identity has expired and was not renewed")]
    Expired,
}

impl IdentityError {
    /// The stable code.
    pub const fn code(self) -> &'static str {
        match self {
            Self::Pending => "cert_pending",
            Self::Expired => "certificate_expired",
        }
    }
}

/// The identities of this node. Clones share them.
#[derive(Clone)]
pub struct Identities(Arc<Inner>);

struct Inner {
    certificates: Certificates,
    revocations: Revocations,
    ready: ArcSwap<Ready>,
    changed: watch::Sender<()>,
}

/// What each identity has, or had until it expired; nothing was issued for others.
type Ready = HashMap<SpiffeId, Result<Arc<Identity>, IdentityError>>;

impl Identities {
    /// No identities yet; their certificates will come from `certificates`, and peers are believed
    /// unless `revocations` says otherwise.
    pub fn new(certificates: Certificates, revocations: Revocations) -> Self {
        let (ready, changed) = (ArcSwap::default(), watch::Sender::new(()));
        Self(Arc::new(Inner {
            certificates,
            revocations,
            ready,
            changed,
        }))
    }

    /// Says which identities run on this node now. Others are forgotten, key and all.
    pub fn set_identities(&self, identities: BTreeSet<SpiffeId>) {
        self.0.certificates.set_identities(identities);
    }

    /// Follows the certificates until cancelled.
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

    /// The certificate and TLS of an identity, at once or not at all.
    pub fn current(&self, identity: &SpiffeId) -> Result<Arc<Identity>, IdentityError> {
        let ready = self.0.ready.load();
        let found = ready.get(identity).ok_or(IdentityError::Pending)?;
        let found = found.as_ref().map_err(|error| *error)?;
        if !self.0.certificates.is_valid(&found.certificate) {
            return Err(IdentityError::Expired);
        }
        Ok(found.clone())
    }

    /// The same for a connection, which waits a while for a certificate if there is none. It is
    /// served before all others.
    pub(crate) async fn ready(&self, identity: &SpiffeId) -> Result<Arc<Identity>, IdentityError> {
        self.wait_for(identity, Priority::Connection).await
    }

    /// The same for a pod that is being enrolled.
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
        // Most calls end above; the wait's state is none of theirs.
        let wait = Box::pin(self.wait(identity, priority));
        timeout(FIRST_CERTIFICATE, wait)
            .await
            .unwrap_or_else(|_| self.current(identity))
    }

    async fn wait(
        &self,
        identity: &SpiffeId,
        priority: Priority,
    ) -> Result<Arc<Identity>, IdentityError> {
        let mut changed = self.0.changed.subscribe();
        let mut again = interval(AGAIN);
        loop {
            changed.borrow_and_update();
            let found = self.current(identity);
            if found.is_ok() {
                return found;
            }
            tokio::select! {
                _ = again.tick() => self.0.certificates.prioritize(identity, priority),
                changed = changed.changed() => if changed.is_err() { return found },
            }
        }
    }

    /// How everything stands; for the admin page.
    pub fn state(&self) -> Arc<CertificatesState> {
        self.0.certificates.state()
    }

    /// Makes TLS of every certificate that is new, or of all if the bundle is.
    async fn rebuild(&self, telemetry: &Telemetry) {
        let (before, state) = (self.0.ready.load_full(), self.0.certificates.state());
        let mut after = Ready::with_capacity(state.identities.len());
        let mut builds = 0_usize;
        for status in &state.identities {
            let identity = &status.identity;
            let old = before.get(identity).and_then(|old| old.as_ref().ok());
            let Some(certificate) = &status.certificate else {
                if let IdentityState::Expired { at } = status.state {
                    // Who watches for ends that are near is not to be left without the worst one.
                    telemetry.record_certificate_expiry(identity, Some(at));
                    after.insert(identity.clone(), Err(IdentityError::Expired));
                }
                continue;
            };
            if let Some(kept) = old.filter(|old| old.is_of(certificate, &state.bundle)) {
                after.insert(identity.clone(), Ok(kept.clone()));
                continue;
            }
            let built = self.build(certificate, &state.bundle);
            // A certificate that cannot be used leaves what still works in place.
            if let Some(built) = built.or_else(|| old.cloned()) {
                telemetry.record_certificate_expiry(identity, Some(built.certificate.not_after));
                after.insert(identity.clone(), Ok(built));
            }
            builds += 1;
            if builds.is_multiple_of(BUILDS) {
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
                tracing::error!(%identity, error = &error as &dyn Error, "a new certificate cannot be used");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;
