//! Which certificate does the service itself present? One that its own authority signs, renewed
//! without a restart.

use std::error::Error;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use component::LastError;
use mesh::certs::{Authority, Validity};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::PrivateKeyDer;
use zeroize::{Zeroize, Zeroizing};

use super::state::CaState;

/// A leaked key can be used for a day.
const TTL: Duration = Duration::from_secs(24 * 3600);

/// Provides the service's certificate for TLS handshakes, and renews it.
pub(super) struct ServingCertResolver {
    names: Vec<SanType>,
    provider: Arc<CryptoProvider>,
    current: ArcSwapOption<ServingCert>,
    last_error: Mutex<LastError>,
}

struct ServingCert {
    certified_key: Arc<CertifiedKey>,
    issuer: Arc<Authority>,
    renew_at: SystemTime,
}

impl ServingCertResolver {
    /// A resolver for a service with these names; without a certificate until the first
    /// [`renew`](Self::renew).
    pub(super) fn new(names: Vec<SanType>) -> Arc<Self> {
        Arc::new(Self {
            names,
            provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
            current: ArcSwapOption::empty(),
            last_error: Mutex::default(),
        })
    }

    /// Renews the certificate at half of its lifetime, and when another authority signs.
    pub(super) fn renew(&self, state: &CaState) {
        let (now, signing) = (state.now(), state.signing_authority());
        let is_current =
            |cert: &ServingCert| now < cert.renew_at && Arc::ptr_eq(&cert.issuer, &signing);
        if self.current.load().as_deref().is_some_and(is_current) {
            return;
        }
        let error = match self.issue(&signing, now) {
            Ok(cert) => {
                tracing::info!("renewed the certificate of the service");
                self.current.store(Some(Arc::new(cert)));
                None
            }
            Err(error) => Some(error),
        };
        let mut last_error = self
            .last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = last_error.record(error.as_deref()) {
            tracing::error!(error, "cannot renew the certificate of the service");
        }
    }

    /// Whether there is a certificate.
    pub(super) fn is_ready(&self) -> bool {
        self.current.load().is_some()
    }

    /// TLS 1.3 only. No session tickets: callers keep their connections.
    pub(super) fn tls_config(self: &Arc<Self>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_cert_resolver(self.clone());
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Arc::new(config))
    }

    fn issue(
        &self,
        authority: &Arc<Authority>,
        now: SystemTime,
    ) -> Result<ServingCert, Box<dyn Error>> {
        let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut validity = Validity::new(now, TTL);
        validity.not_after = validity.not_after.min(authority.not_after());
        let lifetime = validity.not_after.duration_since(now);
        let lifetime = lifetime.map_err(|_| "the authority's own certificate has expired")?;
        let chain = authority.sign_server(&pair, self.names.clone(), validity);
        let key = Zeroizing::new(pair.serialize_der());
        pair.zeroize();
        let key = PrivateKeyDer::Pkcs8(key.as_slice().into());
        let key = self
            .provider
            .key_provider
            .load_private_key(key.clone_key())?;
        Ok(ServingCert {
            certified_key: Arc::new(CertifiedKey::new(chain?, key)),
            issuer: authority.clone(),
            renew_at: now + lifetime / 2,
        })
    }
}

impl ResolvesServerCert for ServingCertResolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let current = self.current.load();
        current.as_ref().map(|cert| cert.certified_key.clone())
    }
}

impl fmt::Debug for ServingCertResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServingCertResolver")
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}
