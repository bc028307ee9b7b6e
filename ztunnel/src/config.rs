//! The daemon's configuration: flags and environment variables, checked together at the start.
//!
//! Flags and variables have Istio's names where the meaning is the same. All mistakes are reported
//! at once, so that an operator corrects a manifest in one go instead of one restart per mistake.

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

use crate::ports_and_marks::{ADMIN_PORT, READINESS_PORT, STATS_PORT};
use crate::telemetry::{LogConfig, LogFormat};
pub use arguments::Arguments;
use parse::threads;
pub use provider::IdentityProvider;

/// Istio's default trust domain.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// Istio's default: long enough for requests to finish, far below the kubelet's 30 s grace period.
const TERMINATION_DEADLINE: Duration = Duration::from_secs(5);
/// Istio's default: a leaked key is valid for a day at most, and an outage of the certificate
/// authority is noticed long before certificates expire.
const CERT_TTL: Duration = Duration::from_secs(24 * 3600);
/// Shortest lifetime of a certificate that can be renewed in time, after half of it.
const MIN_CERT_TTL: Duration = Duration::from_secs(10);
/// A day, like the certificates with which a tunnel is opened.
const TUNNEL_MAX_AGE: Duration = Duration::from_secs(24 * 3600);
/// Below this, tunnels would spend most of their time on handshakes.
const MIN_TUNNEL_MAX_AGE: Duration = Duration::from_secs(1);
/// At this interval the verification of 100 pods takes 2% of a core.
const VERIFY_INTERVAL: Duration = Duration::from_secs(2);
/// Below this, the control thread would spend most of its time on verification.
const MIN_VERIFY_INTERVAL: Duration = Duration::from_millis(100);
/// Upper bound of the default. One thread per core is fastest, but each thread has three listeners
/// in every pod: with 110 pods and this many threads there are 5,280.
const MAX_DEFAULT_WORKERS: usize = 16;
const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), ADMIN_PORT);
const STATS: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::UNSPECIFIED), STATS_PORT);
const READINESS: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::UNSPECIFIED), READINESS_PORT);

/// The daemon's complete and validated configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this node.
    pub node: Arc<str>,
    /// Folder of the Kubernetes objects.
    pub source_folder: PathBuf,
    /// Where the identities of this node's pods come from.
    pub identities: IdentityProvider,
    /// Folder with the paths of the pods' network namespaces.
    pub netns_dir: PathBuf,
    /// Mesh-wide parameters.
    pub mesh: Params,
    /// Data-plane threads, at least one.
    pub workers: usize,
    /// Deadline of the drain.
    pub termination_deadline: Duration,
    /// Lifetime of the pods' certificates.
    pub cert_ttl: Duration,
    /// File of revoked certificates.
    pub crl_path: Option<PathBuf>,
    /// Age after which a tunnel takes no new connections.
    pub tunnel_max_age: Duration,
    /// Initial format and levels of the log.
    pub log: LogConfig,
    /// Address of the admin port, on loopback.
    pub admin: SocketAddr,
    /// Address of the metrics port.
    pub stats: SocketAddr,
    /// Address of the readiness port.
    pub readiness: SocketAddr,
    /// Interval of verification.
    pub verify_interval: Duration,
}

impl Config {
    /// Parses the arguments.
    ///
    /// # Errors
    /// Fails with all missing, empty and malformed values.
    pub fn from_arguments(arguments: Arguments) -> Result<Self, ConfigError> {
        let mut errors = FlagErrors::default();
        arguments.reject_empty(&mut errors);
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let identities = IdentityProvider::from_arguments(&arguments, &mut errors);
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
                cores.min(MAX_DEFAULT_WORKERS),
                |text| threads(text, cores),
            ),
            termination_deadline: errors.parse(
                "--termination-deadline",
                arguments.termination_deadline,
                TERMINATION_DEADLINE,
                |text| duration(text, Duration::ZERO),
            ),
            cert_ttl: errors.parse("--cert-ttl", arguments.cert_ttl, CERT_TTL, |text| {
                duration(text, MIN_CERT_TTL)
            }),
            crl_path: arguments.crl_path,
            tunnel_max_age: errors.parse(
                "--tunnel-max-age",
                arguments.tunnel_max_age,
                TUNNEL_MAX_AGE,
                |text| duration(text, MIN_TUNNEL_MAX_AGE),
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
                |text| duration(text, MIN_VERIFY_INTERVAL),
            ),
        };
        errors.into_result()?;
        Ok(config)
    }

    /// The configuration as shown on the admin page. It contains no secrets.
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

/// The mesh-wide parameters.
fn params(arguments: &Arguments, errors: &mut FlagErrors) -> Params {
    let trust_domain = arguments.trust_domain.as_deref();
    let mut params = Params::new(errors.trust_domain(trust_domain.unwrap_or(DEFAULT_TRUST_DOMAIN)));
    let override_with = |value: &Option<String>, parameter: &mut Arc<str>| {
        if let Some(value) = value {
            *parameter = value.as_str().into();
        }
    };
    override_with(&arguments.cluster_id, &mut params.cluster);
    override_with(&arguments.cluster_domain, &mut params.cluster_domain);
    override_with(&arguments.root_namespace, &mut params.root_namespace);
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
