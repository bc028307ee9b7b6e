//! The command line: flags with environment variables behind them, read once, checked together.
//!
//! Names are Istio's where the meaning is the same. Everything that is wrong is reported at once,
//! so that an operator mends a manifest in one go and not in as many restarts as it has mistakes.

mod arguments;
mod parse;
mod provider;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use component::flags::ConfigError;
use component::flags::{FlagErrors, duration, log_filter, loopback_addr, socket_addr};
use mesh::Params;
use serde::Serialize;
use serde_json::{Value, json};

use crate::contract::{ADMIN_PORT, READINESS_PORT, STATS_PORT};
use crate::telemetry::{LogConfig, LogFormat};
pub use arguments::Arguments;
use parse::threads;
pub use provider::IdentityProvider;

/// Istio's default trust domain.
const CLUSTER_LOCAL: &str = "cluster.local";
/// Istio's default: long enough for requests to end, short enough for a kubelet's 30 s of grace.
const TERMINATION_DEADLINE: Duration = Duration::from_secs(5);
/// Istio's default: a leaked key is worth a day, and a certificate authority that is down is
/// noticed long before the leaf is.
const CERT_TTL: Duration = Duration::from_secs(24 * 3600);
/// The shortest life of a certificate that can be renewed in time, at its half.
const CERT_TTL_LEAST: Duration = Duration::from_secs(10);
/// A day, as long as the certificates that a tunnel began with.
const TUNNEL_MAX_AGE: Duration = Duration::from_secs(24 * 3600);
/// Below this, handshakes would be most of what tunnels do.
const TUNNEL_MAX_AGE_LEAST: Duration = Duration::from_secs(1);
/// At this period the verification of 100 pods takes 2% of a core.
const VERIFY_INTERVAL: Duration = Duration::from_secs(2);
/// More often than this, verification would be most of what the control thread does.
const VERIFY_INTERVAL_LEAST: Duration = Duration::from_millis(100);
/// One thread per core is fastest, but each has three listeners in every pod: on a node of 110 pods
/// this many threads hold 5,280.
const WORKERS_MOST: usize = 16;
const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), ADMIN_PORT);
const STATS: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::UNSPECIFIED), STATS_PORT);
const READINESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::UNSPECIFIED), READINESS_PORT);

/// The daemon's configuration: complete and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// This node.
    pub node: Arc<str>,
    /// Where the objects are.
    pub source_folder: PathBuf,
    /// Where the identities of this node's pods come from.
    pub identities: IdentityProvider,
    /// Where the pods' namespaces are found.
    pub netns_dir: PathBuf,
    /// What the mesh is told about itself.
    pub mesh: Params,
    /// Data-plane threads, at least one.
    pub workers: usize,
    /// How long a drain may take.
    pub termination_deadline: Duration,
    /// Life of a leaf certificate.
    pub cert_ttl: Duration,
    /// Where the revoked certificates are listed, if anywhere.
    pub crl_path: Option<PathBuf>,
    /// How long a tunnel takes new connections.
    pub tunnel_max_age: Duration,
    /// How the log starts.
    pub log: LogConfig,
    /// Admin port, on loopback.
    pub admin: SocketAddr,
    /// Metrics port.
    pub stats: SocketAddr,
    /// Readiness port.
    pub readiness: SocketAddr,
    /// Period of verification.
    pub verify_interval: Duration,
}

impl Config {
    /// Understands the arguments, or says all that is wrong with them.
    ///
    /// # Errors
    /// Fails with every missing and every malformed value.
    pub fn from_arguments(arguments: Arguments) -> Result<Self, ConfigError> {
        let mut errors = FlagErrors::default();
        arguments.filled(&mut errors);
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let identities = IdentityProvider::chosen(&arguments, &mut errors);
        let mesh = params(&arguments, &mut errors);
        let config = Self {
            node: errors
                .required("--node-name (NODE_NAME)", arguments.node_name)
                .into(),
            source_folder: errors.required(
                "--source-folder (AMBIT_SOURCE_FOLDER)",
                arguments.source_folder,
            ),
            identities,
            netns_dir: errors.required("--netns-dir (AMBIT_NETNS_DIR)", arguments.netns_dir),
            mesh,
            workers: errors.parse(
                "--worker-threads",
                arguments.worker_threads,
                cores.min(WORKERS_MOST),
                |text| threads(text, cores),
            ),
            termination_deadline: errors.parse(
                "--termination-deadline",
                arguments.termination_deadline,
                TERMINATION_DEADLINE,
                |text| duration(text, Duration::ZERO),
            ),
            cert_ttl: errors.parse("--cert-ttl", arguments.cert_ttl, CERT_TTL, |text| {
                duration(text, CERT_TTL_LEAST)
            }),
            crl_path: arguments.crl_path,
            tunnel_max_age: errors.parse(
                "--tunnel-max-age",
                arguments.tunnel_max_age,
                TUNNEL_MAX_AGE,
                |text| duration(text, TUNNEL_MAX_AGE_LEAST),
            ),
            log: LogConfig {
                format: errors.parse(
                    "--log-format",
                    arguments.log_format,
                    LogFormat::Plain,
                    str::parse,
                ),
                filter: errors.parse(
                    "--log-level",
                    arguments.log_level,
                    "info".into(),
                    log_filter,
                ),
            },
            admin: errors.parse("--admin-addr", arguments.admin_addr, ADMIN, loopback_addr),
            stats: errors.parse("--stats-addr", arguments.stats_addr, STATS, socket_addr),
            readiness: errors.parse(
                "--readiness-addr",
                arguments.readiness_addr,
                READINESS,
                socket_addr,
            ),
            verify_interval: errors.parse(
                "--verify-interval",
                arguments.verify_interval,
                VERIFY_INTERVAL,
                |text| duration(text, VERIFY_INTERVAL_LEAST),
            ),
        };
        errors.into_result()?;
        Ok(config)
    }

    /// The configuration as the admin page shows it. There are no secrets in it.
    pub fn to_json(&self) -> Value {
        #[derive(Serialize)]
        struct Seconds(f64);
        let seconds = |duration: Duration| Seconds(duration.as_secs_f64());
        let aliases: Vec<_> = self
            .mesh
            .trust_domain_aliases
            .iter()
            .map(ToString::to_string)
            .collect();
        json!({
            "nodeName": self.node,
            "sourceFolder": self.source_folder,
            "identities": self.identities,
            "netnsDir": self.netns_dir,
            "clusterId": self.mesh.cluster,
            "trustDomain": self.mesh.trust_domain.to_string(),
            "trustDomainAliases": aliases,
            "rootNamespace": self.mesh.root_namespace,
            "networkPolicy": self.mesh.network_policy,
            "clusterDomain": self.mesh.cluster_domain,
            "excludedNamespaces": self.mesh.excluded_namespaces,
            "workerThreads": self.workers,
            "terminationDeadlineSeconds": seconds(self.termination_deadline),
            "certTtlSeconds": seconds(self.cert_ttl),
            "crlPath": self.crl_path,
            "tunnelMaxAgeSeconds": seconds(self.tunnel_max_age),
            "adminAddr": self.admin,
            "statsAddr": self.stats,
            "readinessAddr": self.readiness,
            "verifyIntervalSeconds": seconds(self.verify_interval),
        })
    }
}

fn params(arguments: &Arguments, errors: &mut FlagErrors) -> Params {
    let trust_domain = arguments.trust_domain.as_deref();
    let mut params = Params::new(errors.trust_domain(trust_domain.unwrap_or(CLUSTER_LOCAL)));
    let said = |text: &Option<String>, default: &mut Arc<str>| {
        if let Some(text) = text {
            *default = text.as_str().into();
        }
    };
    said(&arguments.cluster_id, &mut params.cluster);
    said(&arguments.cluster_domain, &mut params.cluster_domain);
    said(&arguments.root_namespace, &mut params.root_namespace);
    if let Some(namespaces) = &arguments.excluded_namespaces {
        params.excluded_namespaces = parse::list(namespaces);
    }
    params.trust_domain_aliases =
        parse::trust_domain_aliases(errors, arguments.trust_domain_aliases.as_deref());
    params.network_policy = errors.parse(
        "--network-policy",
        arguments.network_policy.clone(),
        true,
        parse::is_enforced,
    );
    params
}

#[cfg(test)]
mod tests;
