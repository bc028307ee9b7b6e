//! The flags of the command line: name, environment variable and help of each.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use clap::Parser;
use component::flags::FlagErrors;

/// The unparsed command line. Values are text, so that the mistakes of all can be reported
/// together.
#[derive(Debug, Default, Parser)]
#[command(name = "ztunnel", version, about = "The node daemon of the Ambit mesh")]
pub struct Arguments {
    /// Name of the node that this daemon serves
    #[arg(long, env = "NODE_NAME")]
    pub(super) node_name: Option<String>,
    /// Folder of Kubernetes YAML that describes the cluster; changes are followed
    #[arg(long, env = "AMBIT_SOURCE_FOLDER")]
    pub(super) source_folder: Option<PathBuf>,
    /// Take identities from a certificate authority in this folder: its root and its key
    #[arg(long, env = "AMBIT_CA_DIR")]
    pub(super) ca_dir: Option<PathBuf>,
    /// Take identities from a certificate authority with Istio's protocol, such as `ambit ca` or
    /// istiod: host:port
    #[arg(long, env = "CA_ADDRESS")]
    pub(super) ca_address: Option<String>,
    /// File with the roots that --ca-address is verified against; changes are followed
    #[arg(long, env = "CA_ROOT_CA")]
    pub(super) ca_root_cert: Option<PathBuf>,
    /// File with the token that this daemon presents to --ca-address; read for each call
    #[arg(long, env = "AUTH_TOKEN")]
    pub(super) ca_token: Option<PathBuf>,
    /// Name in the certificate of --ca-address, if it is not the host's
    #[arg(long, env = "ALT_CA_HOSTNAME")]
    pub(super) ca_server_name: Option<String>,
    /// Take identities from SPIRE: the admin socket of this node's agent
    #[arg(long, env = "AMBIT_SPIRE_SOCKET")]
    pub(super) spire_socket: Option<PathBuf>,
    /// Folder with one file per pod: named by the pod's uid, containing the path of its network
    /// namespace
    #[arg(long, env = "AMBIT_NETNS_DIR")]
    pub(super) netns_dir: Option<PathBuf>,
    /// Cluster id [default: Kubernetes]
    #[arg(long, env = "CLUSTER_ID")]
    pub(super) cluster_id: Option<String>,
    /// Trust domain of the identities of this cluster [default: cluster.local]
    #[arg(long, env = "TRUST_DOMAIN")]
    pub(super) trust_domain: Option<String>,
    /// Other names of the trust domain, separated by commas: peers and policies may use them too
    #[arg(long, env = "AMBIT_TRUST_DOMAIN_ALIASES")]
    pub(super) trust_domain_aliases: Option<String>,
    /// Namespace whose policies apply to the whole mesh [default: istio-system]
    #[arg(long, env = "AMBIT_ROOT_NAMESPACE")]
    pub(super) root_namespace: Option<String>,
    /// Whether Kubernetes NetworkPolicies are enforced inside the mesh: enforce or off [default:
    /// enforce]
    #[arg(long, env = "AMBIT_NETWORK_POLICY")]
    pub(super) network_policy: Option<String>,
    /// DNS suffix of services [default: cluster.local]
    #[arg(long, env = "CLUSTER_DOMAIN")]
    pub(super) cluster_domain: Option<String>,
    /// Namespaces whose pods are never meshed, separated by commas [default: kube-system]
    #[arg(long, env = "AMBIT_EXCLUDED_NAMESPACES")]
    pub(super) excluded_namespaces: Option<String>,
    /// Data-plane threads: a number, a percentage of the cores, or 0 for all of them [default: one
    /// per core, 16 at most]
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS")]
    pub(super) worker_threads: Option<String>,
    /// How long open connections may continue after a signal to stop [default: 5s]
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE")]
    pub(super) termination_deadline: Option<String>,
    /// Lifetime of the certificates of this node's pods [default: 24h]
    #[arg(long, env = "SECRET_TTL")]
    pub(super) cert_ttl: Option<String>,
    /// File of revoked certificates (CRLs, PEM or DER); changes are followed
    #[arg(long, env = "CRL_PATH")]
    pub(super) crl_path: Option<PathBuf>,
    /// Age after which a tunnel takes no new connections, so that both ends authenticate again
    /// [default: 24h]
    #[arg(long, env = "AMBIT_TUNNEL_MAX_AGE")]
    pub(super) tunnel_max_age: Option<String>,
    /// Log format: plain or json [default: plain]
    #[arg(long, env = "LOG_FORMAT")]
    pub(super) log_format: Option<String>,
    /// Log levels, such as info or debug,access=off [default: info]
    #[arg(long, env = "RUST_LOG")]
    pub(super) log_level: Option<String>,
    /// Admin address; must be a loopback address, because it has no authentication [default:
    /// 127.0.0.1:15000]
    #[arg(long, env = "AMBIT_ADMIN_ADDR")]
    pub(super) admin_addr: Option<String>,
    /// Metrics address [default: [::]:15020]
    #[arg(long, env = "AMBIT_STATS_ADDR")]
    pub(super) stats_addr: Option<String>,
    /// Readiness address [default: [::]:15021]
    #[arg(long, env = "AMBIT_READINESS_ADDR")]
    pub(super) readiness_addr: Option<String>,
    /// Interval at which the capture of every pod is verified [default: 2s]
    #[arg(long, env = "AMBIT_VERIFY_INTERVAL")]
    pub(super) verify_interval: Option<String>,
}

impl Arguments {
    /// Reports values that are set and empty.
    pub(super) fn reject_empty(&self, errors: &mut FlagErrors) {
        fn text(value: &Option<String>) -> Option<&OsStr> {
            value.as_deref().map(OsStr::new)
        }
        fn path(value: &Option<PathBuf>) -> Option<&OsStr> {
            value.as_deref().map(Path::as_os_str)
        }
        errors.reject_empty(&[
            ("--node-name (NODE_NAME)", text(&self.node_name)),
            (
                "--source-folder (AMBIT_SOURCE_FOLDER)",
                path(&self.source_folder),
            ),
            ("--ca-dir (AMBIT_CA_DIR)", path(&self.ca_dir)),
            ("--ca-address (CA_ADDRESS)", text(&self.ca_address)),
            ("--ca-root-cert (CA_ROOT_CA)", path(&self.ca_root_cert)),
            ("--ca-token (AUTH_TOKEN)", path(&self.ca_token)),
            (
                "--ca-server-name (ALT_CA_HOSTNAME)",
                text(&self.ca_server_name),
            ),
            (
                "--spire-socket (AMBIT_SPIRE_SOCKET)",
                path(&self.spire_socket),
            ),
            ("--netns-dir (AMBIT_NETNS_DIR)", path(&self.netns_dir)),
            ("--cluster-id (CLUSTER_ID)", text(&self.cluster_id)),
            ("--trust-domain (TRUST_DOMAIN)", text(&self.trust_domain)),
            (
                "--root-namespace (AMBIT_ROOT_NAMESPACE)",
                text(&self.root_namespace),
            ),
            (
                "--network-policy (AMBIT_NETWORK_POLICY)",
                text(&self.network_policy),
            ),
            (
                "--cluster-domain (CLUSTER_DOMAIN)",
                text(&self.cluster_domain),
            ),
            (
                "--worker-threads (ZTUNNEL_WORKER_THREADS)",
                text(&self.worker_threads),
            ),
            (
                "--termination-deadline (CONNECTION_TERMINATION_DEADLINE)",
                text(&self.termination_deadline),
            ),
            ("--cert-ttl (SECRET_TTL)", text(&self.cert_ttl)),
            ("--crl-path (CRL_PATH)", path(&self.crl_path)),
            (
                "--tunnel-max-age (AMBIT_TUNNEL_MAX_AGE)",
                text(&self.tunnel_max_age),
            ),
            ("--log-format (LOG_FORMAT)", text(&self.log_format)),
            ("--log-level (RUST_LOG)", text(&self.log_level)),
            ("--admin-addr (AMBIT_ADMIN_ADDR)", text(&self.admin_addr)),
            ("--stats-addr (AMBIT_STATS_ADDR)", text(&self.stats_addr)),
            (
                "--readiness-addr (AMBIT_READINESS_ADDR)",
                text(&self.readiness_addr),
            ),
            (
                "--verify-interval (AMBIT_VERIFY_INTERVAL)",
                text(&self.verify_interval),
            ),
        ]);
    }
}
