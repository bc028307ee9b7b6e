//! The certificate that the service itself shows, signed by the authority that it is.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use component::ErrorChain;
use mesh::certs::{Authority, Validity};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::PrivateKeyDer;
use zeroize::{Zeroize, Zeroizing};

use super::keeper::Keeper;

/// A key that leaks is worth a day.
const TTL: Duration = Duration::from_secs(24 * 3600);

/// Keeps a good certificate, and shows it in handshakes.
pub(super) struct Serving {
    names: Vec<SanType>,
    provider: Arc<CryptoProvider>,
    shown: ArcSwapOption<Shown>,
    /// Tried every second; told when it changes.
    complaint: Mutex<Option<String>>,
}

struct Shown {
    key: Arc<CertifiedKey>,
    by: Arc<Authority>,
    renew_at: SystemTime,
}

impl Serving {
    pub(super) fn new(names: Vec<SanType>) -> Arc<Self> {
        Arc::new(Self {
            names,
            provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
            shown: ArcSwapOption::empty(),
            complaint: Mutex::default(),
        })
    }

    /// Renews at half of its life, and when another authority signs.
    pub(super) fn look(&self, keeper: &Keeper) {
        let (now, signing) = (keeper.now(), keeper.signing());
        let shown = self.shown.load();
        let good = |shown: &Shown| now < shown.renew_at && Arc::ptr_eq(&shown.by, &signing);
        if shown.as_deref().is_some_and(good) {
            return;
        }
        let complains = match self.sign(&signing, now) {
            Ok(shown) => {
                tracing::info!("the service shows a new certificate");
                self.shown.store(Some(Arc::new(shown)));
                None
            }
            Err(error) => Some(ErrorChain(&*error).to_string()),
        };
        let mut complaint = self
            .complaint
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = complains.as_ref().filter(|_| complains != *complaint) {
            tracing::error!(error, "the certificate of the service cannot be renewed");
        }
        *complaint = complains;
    }

    /// Whether there is one to show.
    pub(super) fn ready(&self) -> bool {
        self.shown.load().is_some()
    }

    fn sign(
        &self,
        authority: &Arc<Authority>,
        now: SystemTime,
    ) -> Result<Shown, Box<dyn std::error::Error>> {
        let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut validity = Validity::new(now, TTL);
        validity.not_after = validity.not_after.min(authority.not_after());
        let left = validity.not_after.duration_since(now);
        let left = left.map_err(|_| "the authority's own certificate has expired")?;
        let chain = authority.sign_server(&pair, self.names.clone(), validity);
        let key = Zeroizing::new(pair.serialize_der());
        pair.zeroize();
        let key = PrivateKeyDer::Pkcs8(key.as_slice().into());
        let key = self
            .provider
            .key_provider
            .load_private_key(key.clone_key())?;
        Ok(Shown {
            key: Arc::new(CertifiedKey::new(chain?, key)),
            by: authority.clone(),
            renew_at: now + left / 2,
        })
    }

    /// TLS 1.3 only, without tickets: callers keep their connections.
    pub(super) fn tls(self: &Arc<Self>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.shown.load().as_ref().map(|shown| shown.key.clone())
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving")
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}
