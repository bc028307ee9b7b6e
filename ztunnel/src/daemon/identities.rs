//! The certificates of this node, from the configured identity provider.

use std::sync::Arc;

use mesh::certs::{
    CertificateSource, Certificates, CertificatesConfig, IstioCa, IstioCaConfig, LocalCa,
    RenewalTask, Spire, SpireConfig,
};

use super::Error;
use crate::config::{Config, IdentityProvider};

/// Creates the certificates of this node and the task that renews them.
pub(super) fn certificates(config: &Config) -> Result<(Certificates, RenewalTask), Error> {
    let source = source(config)?;
    let config = CertificatesConfig {
        ttl: config.cert_ttl,
        ..CertificatesConfig::default()
    };
    Ok(Certificates::new(source, config))
}

fn source(config: &Config) -> Result<Arc<dyn CertificateSource>, Error> {
    Ok(match &config.identities {
        IdentityProvider::LocalCa { dir } => {
            Arc::new(LocalCa::open(dir).map_err(|source| Error::Authority {
                folder: dir.clone(),
                source,
            })?)
        }
        IdentityProvider::IstioCa {
            address,
            root_cert,
            token,
            server_name,
        } => {
            let client = IstioCaConfig {
                server_name: server_name.clone(),
                cluster_id: config.mesh.cluster.to_string(),
                ..IstioCaConfig::new(address, root_cert, token)
            };
            Arc::new(IstioCa::new(client)?)
        }
        IdentityProvider::Spire { socket } => Arc::new(Spire::new(SpireConfig {
            socket: socket.clone(),
            trust_domain: config.mesh.trust_domain.clone(),
        })),
    })
}
