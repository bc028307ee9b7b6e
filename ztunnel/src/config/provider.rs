//! Where identities come from: exactly one of three providers.

use std::path::PathBuf;

use component::flags::FlagErrors;
use mesh::certs::{IstioCaConfig, IstioCaError};
use serde::Serialize;

use super::Arguments;

/// Where the identities of this node's pods come from. Contains paths and addresses, no secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(
    tag = "provider",
    rename_all = "camelCase",
    rename_all_fields = "camelCase"
)]
pub enum IdentityProvider {
    /// A certificate authority in a folder.
    LocalCa {
        /// The folder.
        dir: PathBuf,
    },
    /// A certificate authority with Istio's protocol.
    IstioCa {
        /// Host and port.
        address: String,
        /// File with the roots that it is verified against.
        root_cert: PathBuf,
        /// File with the token that the daemon presents.
        token: PathBuf,
        /// Name in its certificate, if it differs from the host.
        server_name: Option<String>,
    },
    /// SPIRE's agent on this node.
    Spire {
        /// Its admin socket.
        socket: PathBuf,
    },
}

const LOCAL: &str = "--ca-dir (AMBIT_CA_DIR)";
const ISTIO: &str = "--ca-address (CA_ADDRESS)";
const SPIRE: &str = "--spire-socket (AMBIT_SPIRE_SOCKET)";

impl IdentityProvider {
    /// The provider that the flags select. None and more than one are mistakes: with two, a pod's
    /// issuer would be ambiguous.
    pub(super) fn from_arguments(arguments: &Arguments, errors: &mut FlagErrors) -> Self {
        let flags = [
            (LOCAL, arguments.ca_dir.is_some()),
            (ISTIO, arguments.ca_address.is_some()),
            (SPIRE, arguments.spire_socket.is_some()),
        ];
        let selected: Vec<_> = flags
            .iter()
            .filter(|(_, is_set)| *is_set)
            .map(|(flag, _)| *flag)
            .collect();
        match selected.as_slice() {
            [_] => {}
            [] => errors.push(format!("one of {LOCAL}, {ISTIO} and {SPIRE} is required")),
            many => errors.push(format!("only one may be given of {}", many.join(", "))),
        }
        match (&arguments.ca_address, &arguments.spire_socket) {
            (Some(address), _) => Self::istio(address, arguments, errors),
            (None, Some(socket)) => Self::Spire {
                socket: socket.clone(),
            },
            (None, None) => Self::LocalCa {
                dir: arguments.ca_dir.clone().unwrap_or_default(),
            },
        }
    }

    fn istio(address: &str, arguments: &Arguments, errors: &mut FlagErrors) -> Self {
        let mut config = IstioCaConfig::new(
            address,
            errors.required(
                "with --ca-address, --ca-root-cert (CA_ROOT_CA)",
                arguments.ca_root_cert.clone(),
            ),
            errors.required(
                "with --ca-address, --ca-token (AUTH_TOKEN)",
                arguments.ca_token.clone(),
            ),
        );
        config.server_name = arguments.ca_server_name.clone();
        if let Some(cluster) = &arguments.cluster_id {
            config.cluster_id = cluster.clone();
        }
        // Errors that the client would otherwise report only when it is created.
        for problem in config.validation_errors() {
            let flag = match problem {
                IstioCaError::Address { .. } => ISTIO,
                IstioCaError::ServerName { .. } => "--ca-server-name (ALT_CA_HOSTNAME)",
                IstioCaError::ClusterId { .. } => "--cluster-id (CLUSTER_ID)",
            };
            errors.push(format!("{flag}: {problem}"));
        }
        Self::IstioCa {
            address: address
                .strip_prefix("https://")
                .unwrap_or(address)
                .to_owned(),
            root_cert: config.root_cert,
            token: config.token,
            server_name: config.server_name,
        }
    }
}
