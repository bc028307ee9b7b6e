//! The identities of this node's pods, ready to use: TLS built once per certificate, read by the workers without a lock.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use hbone::{ClientTls, Credentials, ServerTls, TlsError};
use mesh::certs::{Certificate, Certificates};
use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::telemetry::Telemetry;

/// How long a connection waits for the first certificate of its pod's identity. One is issued when the pod is enrolled, before
/// its applications start, so whoever still waits after this waits for a certificate authority that is down.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(5);

/// One identity with the TLS configurations that speak for it.
pub struct Identity {
    /// For tunnels that this node opens.
    pub client: ClientTls,
    /// For tunnels that this node accepts.
    pub server: ServerTls,
    /// What they were made from.
    pub certificate: Arc<Certificate>,
}

/// Why a pod cannot prove who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No certificate has been issued yet.
    #[error("no certificate has been issued for its identity yet; is the certificate authority reachable?")]
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
    wanted: Mutex<BTreeSet<SpiffeId>>,
    asked: watch::Sender<()>,
    ready: ArcSwap<HashMap<SpiffeId, Arc<Identity>>>,
    changed: watch::Sender<()>,
}

impl Identities {
    /// No identities yet; their certificates will come from `certificates`.
    pub fn new(certificates: Certificates) -> Self {
        Self(Arc::new(Inner {
            certificates,
            wanted: Mutex::default(),
            asked: watch::Sender::new(()),
            ready: ArcSwap::default(),
            changed: watch::Sender::new(()),
        }))
    }

    /// Says which identities run on this node now. Others are forgotten, key and all.
    pub fn wanted(&self, identities: BTreeSet<SpiffeId>) {
        self.0.certificates.wanted(identities.clone());
        *self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner) = identities;
        self.0.asked.send_replace(());
    }

    /// Follows the certificates until cancelled.
    pub async fn run(&self, telemetry: &Telemetry, stop: CancellationToken) {
        let mut certificates = self.0.certificates.subscribe();
        let mut asked = self.0.asked.subscribe();
        loop {
            certificates.borrow_and_update();
            asked.borrow_and_update();
            self.rebuild(telemetry);
            tokio::select! {
                () = stop.cancelled() => return,
                changed = certificates.changed() => if changed.is_err() { return },
                changed = asked.changed() => if changed.is_err() { return },
            }
        }
    }

    /// The certificate and TLS of an identity, at once or not at all.
    pub fn current(&self, identity: &SpiffeId) -> Result<Arc<Identity>, IdentityError> {
        let ready = self.0.ready.load();
        let found = ready.get(identity).ok_or(IdentityError::Pending)?;
        if found.certificate.not_after <= SystemTime::now() {
            return Err(IdentityError::Expired);
        }
        Ok(found.clone())
    }

    /// The same, waiting a while for the first certificate.
    pub(crate) async fn ready(&self, identity: &SpiffeId) -> Result<Arc<Identity>, IdentityError> {
        let found = self.current(identity);
        if found.is_ok() {
            return found;
        }
        let mut changed = self.0.changed.subscribe();
        let wait = async {
            loop {
                changed.borrow_and_update();
                let found = self.current(identity);
                if found.is_ok() || changed.changed().await.is_err() {
                    return found;
                }
            }
        };
        timeout(FIRST_CERTIFICATE, wait).await.unwrap_or_else(|_| self.current(identity))
    }

    /// Every identity that is wanted, with what there is of it; for the admin page.
    pub fn list(&self) -> Vec<(SpiffeId, Option<Arc<Identity>>)> {
        let ready = self.0.ready.load();
        let wanted = self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.iter().map(|identity| (identity.clone(), ready.get(identity).cloned())).collect()
    }

    fn rebuild(&self, telemetry: &Telemetry) {
        let wanted = self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let before = self.0.ready.load_full();
        let mut after = HashMap::with_capacity(wanted.len());
        for id in wanted {
            let old = before.get(&id);
            let certificate = self.0.certificates.current(&id);
            match (old, certificate) {
                (Some(old), Some(new)) if Arc::ptr_eq(&old.certificate, &new) => {
                    after.insert(id, old.clone());
                }
                (old, Some(new)) => match build(new) {
                    Ok(identity) => {
                        after.insert(id, Arc::new(identity));
                    }
                    Err(error) => {
                        tracing::error!(identity = %id, error = &error as &dyn std::error::Error, "a new certificate cannot be used");
                        after.extend(old.map(|old| (id, old.clone())));
                    }
                },
                // A renewal that fails leaves what still works in place.
                (Some(old), None) => {
                    after.insert(id, old.clone());
                }
                (None, None) => {}
            }
        }
        let same = after.len() == before.len()
            && after.iter().all(|(id, identity)| before.get(id).is_some_and(|old| Arc::ptr_eq(old, identity)));
        if same {
            return;
        }
        let expiry: Vec<_> = after.iter().map(|(id, identity)| (id, identity.certificate.not_after)).collect();
        telemetry.certificates(&expiry);
        self.0.ready.store(Arc::new(after));
        self.0.changed.send_replace(());
    }
}

fn build(certificate: Arc<Certificate>) -> Result<Identity, TlsError> {
    let credentials =
        Credentials { chain: certificate.chain.clone(), key: certificate.key(), roots: certificate.roots.clone() };
    Ok(Identity { client: ClientTls::new(&credentials)?, server: ServerTls::new(&credentials)?, certificate })
}
