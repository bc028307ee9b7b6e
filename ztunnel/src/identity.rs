//! The identities of this node's pods, ready to use: TLS built once per certificate, read by the
//! workers without a lock.

use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use hbone::{ClientTls, Credentials, Revocations, ServerTls};
use mesh::certs::{Certificate, Certificates, IdentityStatus, TrustBundle};
use spiffe::SpiffeId;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::telemetry::Telemetry;

/// How long a connection waits for the first certificate of its pod's identity. One is issued when
/// the pod is enrolled, before its applications start, so whoever still waits after this waits for
/// a certificate authority that is down.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(5);

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
    ready: ArcSwap<HashMap<SpiffeId, Arc<Identity>>>,
    changed: watch::Sender<()>,
}

impl Identities {
    /// No identities yet; their certificates will come from `certificates`.
    pub fn new(certificates: Certificates) -> Self {
        let (ready, changed) = (ArcSwap::default(), watch::Sender::new(()));
        Self(Arc::new(Inner {
            certificates,
            ready,
            changed,
        }))
    }

    /// Says which identities run on this node now. Others are forgotten, key and all.
    pub fn wanted(&self, identities: BTreeSet<SpiffeId>) {
        self.0.certificates.wanted(identities);
    }

    /// Follows the certificates until cancelled.
    pub async fn run(&self, telemetry: &Telemetry, stop: CancellationToken) {
        let mut certificates = self.0.certificates.subscribe();
        loop {
            certificates.borrow_and_update();
            self.rebuild(telemetry);
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
        timeout(FIRST_CERTIFICATE, wait)
            .await
            .unwrap_or_else(|_| self.current(identity))
    }

    /// How every identity of this node stands; for the admin page.
    pub fn status(&self) -> Arc<Vec<IdentityStatus>> {
        self.0.certificates.status()
    }

    /// Whom this node trusts; for the admin page.
    pub fn bundle(&self) -> Arc<TrustBundle> {
        self.0.certificates.bundle()
    }

    fn rebuild(&self, telemetry: &Telemetry) {
        let before = self.0.ready.load();
        let status = self.0.certificates.status();
        let bundle = self.0.certificates.bundle();
        let mut after = HashMap::with_capacity(status.len());
        for IdentityStatus {
            identity,
            certificate,
            ..
        } in status.iter()
        {
            let Some(certificate) = certificate else {
                continue;
            };
            let old = before.get(identity);
            let kept = old
                .filter(|old| Arc::ptr_eq(&old.certificate, certificate))
                .filter(|old| Arc::ptr_eq(&old.bundle, &bundle))
                .cloned();
            // A certificate that cannot be used leaves what still works in place.
            if let Some(ready) = kept.or_else(|| build(certificate, &bundle)).or_else(|| old.cloned()) {
                after.insert(identity.clone(), ready);
            }
        }
        let expiry: Vec<_> = after
            .iter()
            .map(|(id, ready)| (id, ready.certificate.not_after))
            .collect();
        telemetry.certificates(&expiry);
        self.0.ready.store(Arc::new(after));
        self.0.changed.send_replace(());
    }
}

fn build(certificate: &Arc<Certificate>, bundle: &Arc<TrustBundle>) -> Option<Arc<Identity>> {
    let credentials = Credentials {
        chain: certificate.chain.clone(),
        key: certificate.key(),
        roots: bundle.roots().to_vec(),
        revocations: Revocations::none(),
    };
    let tls =
        ClientTls::new(&credentials).and_then(|client| Ok((client, ServerTls::new(&credentials)?)));
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

#[cfg(test)]
mod tests {
    use mesh::certs::{CertificatesConfig, LocalCa};
    use tokio::task::JoinSet;

    use super::*;

    fn id(name: &str) -> SpiffeId {
        SpiffeId::new(format!("spiffe://cluster.local/ns/shop/sa/{name}")).unwrap()
    }

    /// Identities whose certificates are issued by tasks of the returned set.
    fn identities() -> (Identities, JoinSet<()>) {
        let folder = tempfile::tempdir().unwrap();
        let ca = Arc::new(LocalCa::create(folder.path()).unwrap());
        let (certificates, renewal) = Certificates::new(ca, CertificatesConfig::default());
        let identities = Identities::new(certificates);
        let mut tasks = JoinSet::new();
        tasks.spawn(renewal.run(CancellationToken::new()));
        let following = identities.clone();
        tasks.spawn(async move {
            let telemetry = Telemetry::new(None).unwrap();
            following.run(&telemetry, CancellationToken::new()).await;
        });
        (identities, tasks)
    }

    #[tokio::test]
    async fn whoever_waits_for_an_identity_gets_it_as_soon_as_it_is_issued() {
        let (identities, _tasks) = identities();
        assert_eq!(
            identities.current(&id("web")).err(),
            Some(IdentityError::Pending)
        );
        let (web, wanted) = (id("web"), BTreeSet::from([id("web")]));
        let (ready, ()) = tokio::join!(identities.ready(&web), async { identities.wanted(wanted) });
        let ready = ready.unwrap();
        assert_eq!(*ready.client.identity(), id("web"));
        // The next to ask gets the same configuration: it is built once for a certificate.
        assert!(Arc::ptr_eq(
            &ready,
            &identities.current(&id("web")).unwrap()
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_for_a_certificate_that_never_comes_has_an_end() {
        let (identities, _tasks) = identities();
        let start = tokio::time::Instant::now();
        assert_eq!(
            identities.ready(&id("web")).await.err(),
            Some(IdentityError::Pending)
        );
        assert_eq!(start.elapsed(), FIRST_CERTIFICATE);
    }

    #[tokio::test]
    async fn an_identity_that_is_no_longer_wanted_is_forgotten() {
        let (identities, _tasks) = identities();
        let mut changed = identities.0.changed.subscribe();
        identities.wanted(BTreeSet::from([id("web"), id("cart")]));
        identities.ready(&id("web")).await.unwrap();
        identities.ready(&id("cart")).await.unwrap();
        identities.wanted(BTreeSet::from([id("cart")]));
        while identities.current(&id("web")).is_ok() {
            changed.changed().await.unwrap();
        }
        assert!(identities.current(&id("cart")).is_ok());
    }
}
