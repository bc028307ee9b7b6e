//! How is the client of a CA configured, and is the configuration valid?

use std::path::PathBuf;
use std::time::Duration;

use rustls_pki_types::ServerName;

use super::address::Address;
use super::request::is_header_value;

/// The address of a CA, and how to authenticate it and this client.
#[derive(Clone, Debug)]
pub struct IstioCaConfig {
    /// `host:port` or `https://host:port`.
    pub address: String,
    /// PEM file of the roots that the CA's own certificate must chain to. Read for every connection.
    pub root_cert: PathBuf,
    /// File of the bearer token. Read for every call.
    pub token: PathBuf,
    /// The DNS name or IP address that the CA's certificate must have, if not the host of `address`.
    pub server_name: Option<String>,
    /// Value of the header `clusterid`.
    pub cluster_id: String,
    /// Deadline for connecting, including the TLS handshake.
    pub connect_timeout: Duration,
    /// Deadline for one certificate.
    pub timeout: Duration,
}

/// Why a configuration is not valid.
#[derive(Debug, thiserror::Error)]
pub enum IstioCaError {
    /// The address is not `host:port`.
    #[error("{address:?} is not the address of a certificate authority, such as ca.example:15012")]
    Address {
        /// The configured value.
        address: String,
    },
    /// The server name is neither a DNS name nor an IP address.
    #[error("{name:?} is neither a DNS name nor an IP address that a certificate can be for")]
    ServerName {
        /// The configured value.
        name: String,
    },
    /// The cluster id is not a header value.
    #[error("the cluster id {id:?} cannot be sent as a header")]
    ClusterId {
        /// The configured value.
        id: String,
    },
}

impl IstioCaConfig {
    /// A configuration with defaults for everything else.
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
            connect_timeout: Duration::from_secs(4),
            // Shorter than the caller's deadline (10 s), so that the caller gets the cause.
            timeout: Duration::from_secs(8),
        }
    }

    /// All errors of the configuration. Without any, [`IstioCa::new`](super::IstioCa::new) succeeds.
    pub fn validation_errors(&self) -> Vec<IstioCaError> {
        let address = self.parse_address();
        // Without a valid address there is no host to check as a server name.
        let name = match &address {
            Err(_) if self.server_name.is_none() => None,
            address => {
                let host = address.as_ref().map_or("", Address::host);
                Some(self.parse_server_name(host))
            }
        };
        let name_error = name.and_then(Result::err);
        address
            .err()
            .into_iter()
            .chain(name_error)
            .chain(self.check_cluster_id().err())
            .collect()
    }

    pub(super) fn parse_address(&self) -> Result<Address, IstioCaError> {
        Address::parse(&self.address).ok_or_else(|| IstioCaError::Address {
            address: self.address.clone(),
        })
    }

    /// The configured server name, or else `host`.
    pub(super) fn parse_server_name(
        &self,
        host: &str,
    ) -> Result<ServerName<'static>, IstioCaError> {
        let name = self.server_name.as_deref().unwrap_or(host);
        ServerName::try_from(name.to_owned())
            .map_err(|_| IstioCaError::ServerName { name: name.into() })
    }

    pub(super) fn check_cluster_id(&self) -> Result<(), IstioCaError> {
        match is_header_value(&self.cluster_id) {
            true => Ok(()),
            false => Err(IstioCaError::ClusterId {
                id: self.cluster_id.clone(),
            }),
        }
    }
}
