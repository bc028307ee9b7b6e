//! Certificates from a service that speaks Istio's protocol: istiod, or `ambit ca`.

pub mod proto;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use spiffe::SpiffeId;
use tokio::sync::watch;

use super::{CertificateSource, IssueError, Issuing, TrustBundle};

/// Where the certificate authority is, and how it is trusted and asked.
#[derive(Clone, Debug)]
pub struct IstioCaConfig {
    /// `host:port` or `https://host:port`.
    pub address: String,
    /// PEM file of the roots that the authority's own certificate must chain to; read again for
    /// every connection.
    pub root_cert: PathBuf,
    /// File of the bearer token; read again for every call.
    pub token: PathBuf,
    /// The DNS name or address the authority's certificate must have, if not the host's.
    pub server_name: Option<String>,
    /// Sent as the header `clusterid`.
    pub cluster_id: String,
    /// How long connecting may take, TLS and all.
    pub connect_timeout: Duration,
    /// How long one call may take.
    pub timeout: Duration,
}

/// Asks a certificate authority over gRPC.
#[derive(Debug)]
pub struct IstioCa {
    config: IstioCaConfig,
}

/// Why no client can be made from a configuration.
#[derive(Debug, thiserror::Error)]
pub enum IstioCaError {
    /// The address is not one.
    #[error("{address:?} is not the address of a certificate authority, such as ca.example:15012")]
    Address {
        /// What was given.
        address: String,
    },
}

impl IstioCaConfig {
    /// The configuration with the defaults for everything but the places.
    pub fn new(
        address: impl Into<String>,
        root_cert: impl Into<PathBuf>,
        token: impl Into<PathBuf>,
    ) -> Self {
        Self {
            address: address.into(),
            root_cert: root_cert.into(),
            token: token.into(),
            server_name: None,
            cluster_id: "Kubernetes".to_owned(),
            connect_timeout: Duration::from_secs(5),
            timeout: Duration::from_secs(8),
        }
    }
}

impl IstioCa {
    /// A client; connects with the first call.
    ///
    /// # Errors
    /// Fails if the address or the server's name cannot be understood.
    pub fn new(config: IstioCaConfig) -> Result<Self, IstioCaError> {
        Ok(Self { config })
    }
}

impl CertificateSource for IstioCa {
    fn issue<'a>(&'a self, identity: &'a SpiffeId, _ttl: Duration) -> Issuing<'a> {
        Box::pin(async move {
            Err(IssueError {
                identity: identity.clone(),
                code: "ca_unreachable",
                message: format!("{} is not asked yet", self.config.address),
            })
        })
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        watch::Sender::new(Arc::default()).subscribe()
    }
}
