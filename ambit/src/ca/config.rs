//! The command line of `ambit ca`: read once, checked together, every mistake reported at once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
pub use component::flags::ConfigError;
use component::flags::{FlagErrors, duration, log_filter, socket_addr};
use rcgen::SanType;
use spiffe::TrustDomain;

use super::log::{Format, LogConfig};

/// Istio's default trust domain.
const TRUST_DOMAIN: &str = "cluster.local";
/// Istio's audience for tokens that are shown to a certificate authority.
const AUDIENCE: &str = "istio-ca";
/// Istio's default.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);
/// A leaked key is worth as long as this.
const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// The shortest life that can be renewed in time, at its half.
const MIN_TTL: Duration = Duration::from_secs(10);
/// Long enough for a request that has begun; Kubernetes grants 30 s.
const TERMINATION_DEADLINE: Duration = Duration::from_secs(5);
/// Istio's ports of this protocol and of its metrics, and the one after that.
const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 15012);
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 15014);
const READINESS: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 15015);

/// What the command line says, before it is understood. Every value is text here, so that all of
/// them can be judged together.
#[derive(Debug, Default, Args)]
pub struct CaArguments {
    /// Folder of the authority in Istio's layout of `cacerts`: root-cert.pem, ca-key.pem, and
    /// ca-cert.pem and cert-chain.pem if the root itself does not sign. Made, with a root of its
    /// own, if there is none; followed when it is replaced
    #[arg(long, env = "AMBIT_CA_DIR")]
    dir: Option<PathBuf>,
    /// Folder where the authority keeps what it must remember while roots are replaced, keys among
    /// it [default: `state` in the authority's folder]
    #[arg(long, env = "AMBIT_CA_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// File with the public keys by which callers' tokens are checked, PEM; followed
    #[arg(long, env = "AMBIT_CA_TOKEN_KEY")]
    token_key: Option<PathBuf>,
    /// What tokens must be meant for [default: istio-ca]
    #[arg(long, env = "AMBIT_CA_AUDIENCE")]
    audience: Option<String>,
    /// Trust domain of the identities that are signed for [default: cluster.local]
    #[arg(long, env = "TRUST_DOMAIN")]
    trust_domain: Option<String>,
    /// DNS names and addresses by which callers know this authority, separated by commas; the
    /// address it listens on and those of this machine alone always belong to them
    #[arg(long, env = "AMBIT_CA_NAMES", alias = "dns-name")]
    names: Option<String>,
    /// Life of a certificate whose request does not say [default: 24h, or --max-ttl if that is less]
    #[arg(long, env = "DEFAULT_WORKLOAD_CERT_TTL")]
    default_ttl: Option<String>,
    /// Longest life of a certificate; longer wishes are cut [default: 24h]
    #[arg(long, env = "MAX_WORKLOAD_CERT_TTL")]
    max_ttl: Option<String>,
    /// Shortest life of a certificate; shorter wishes are refused [default: 10s]
    #[arg(long, env = "AMBIT_CA_MIN_TTL")]
    min_ttl: Option<String>,
    /// Address of the service [default: [::]:15012]
    #[arg(long, env = "AMBIT_CA_LISTEN")]
    listen: Option<String>,
    /// Address of the metrics [default: [::]:15014]
    #[arg(long, env = "AMBIT_CA_STATS_ADDR")]
    stats_addr: Option<String>,
    /// Address of the readiness page [default: [::]:15015]
    #[arg(long, env = "AMBIT_CA_READINESS_ADDR")]
    readiness_addr: Option<String>,
    /// How long open requests may go on after a signal to stop [default: 5s]
    #[arg(long, env = "AMBIT_CA_TERMINATION_DEADLINE")]
    termination_deadline: Option<String>,
    /// plain or json [default: plain]
    #[arg(long, env = "LOG_FORMAT")]
    log_format: Option<String>,
    /// Log levels, such as info or info,access=off [default: info]
    #[arg(long, env = "RUST_LOG")]
    log_level: Option<String>,
}

/// How long certificates live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shorter wishes are refused.
    pub min_ttl: Duration,
    /// Without a wish.
    pub default_ttl: Duration,
    /// Longer wishes are cut.
    pub max_ttl: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            min_ttl: MIN_TTL,
            default_ttl: DEFAULT_TTL,
            max_ttl: MAX_TTL,
        }
    }
}

/// The configuration: complete and checked.
#[derive(Clone, Debug)]
pub struct CaConfig {
    /// Where the authority is.
    pub dir: PathBuf,
    /// Where it remembers.
    pub state_dir: PathBuf,
    /// Where the keys are by which tokens are checked.
    pub token_key: PathBuf,
    /// What tokens must be meant for.
    pub audience: String,
    /// Whose identities are signed for.
    pub trust_domain: TrustDomain,
    /// Names of the service.
    pub names: Vec<SanType>,
    /// How long certificates live.
    pub limits: Limits,
    /// The service's address.
    pub listen: SocketAddr,
    /// The metrics' address.
    pub metrics: SocketAddr,
    /// The readiness page's address.
    pub readiness: SocketAddr,
    /// How long a drain may take.
    pub termination_deadline: Duration,
    /// How the log is written.
    pub log: LogConfig,
}

impl CaConfig {
    /// Understands the arguments, or says all that is wrong with them.
    ///
    /// # Errors
    /// Fails with every missing and every malformed value.
    pub fn from_arguments(arguments: CaArguments) -> Result<Self, ConfigError> {
        let mut errors = FlagErrors::default();
        let dir = errors.required("--dir (AMBIT_CA_DIR)", arguments.dir);
        let limits = Self::limits(
            &mut errors,
            arguments.min_ttl,
            arguments.default_ttl,
            arguments.max_ttl,
        );
        let listen = errors.parse("--listen", arguments.listen, LISTEN, socket_addr);
        let trust_domain = arguments.trust_domain.as_deref().unwrap_or(TRUST_DOMAIN);
        let config = Self {
            state_dir: arguments.state_dir.unwrap_or_else(|| dir.join("state")),
            dir,
            token_key: errors.required("--token-key (AMBIT_CA_TOKEN_KEY)", arguments.token_key),
            audience: arguments.audience.unwrap_or_else(|| AUDIENCE.to_owned()),
            trust_domain: errors.trust_domain(trust_domain),
            names: errors.parse(
                "--names",
                Some(arguments.names.unwrap_or_default()),
                Vec::new(),
                |text| service_names(text, listen.ip()),
            ),
            limits,
            listen,
            metrics: errors.parse("--stats-addr", arguments.stats_addr, METRICS, socket_addr),
            readiness: errors.parse(
                "--readiness-addr",
                arguments.readiness_addr,
                READINESS,
                socket_addr,
            ),
            termination_deadline: errors.parse(
                "--termination-deadline",
                arguments.termination_deadline,
                TERMINATION_DEADLINE,
                |text| duration(text, Duration::ZERO),
            ),
            log: LogConfig {
                format: errors.parse(
                    "--log-format",
                    arguments.log_format,
                    Format::Plain,
                    str::parse,
                ),
                filter: errors.parse(
                    "--log-level",
                    arguments.log_level,
                    "info".to_owned(),
                    log_filter,
                ),
            },
        };
        errors.into_result()?;
        Ok(config)
    }

    fn limits(
        errors: &mut FlagErrors,
        min: Option<String>,
        default: Option<String>,
        max: Option<String>,
    ) -> Limits {
        let second = Duration::from_secs(1);
        let least = |text: &str| duration(text, second);
        let min_ttl = errors.parse("--min-ttl", min, MIN_TTL, least);
        let max_ttl = errors.parse("--max-ttl", max, MAX_TTL, least);
        let default_ttl = errors.parse("--default-ttl", default, DEFAULT_TTL.min(max_ttl), least);
        if min_ttl > default_ttl || default_ttl > max_ttl {
            errors.push(format!(
                "--min-ttl {min_ttl:?}, --default-ttl {default_ttl:?} and --max-ttl {max_ttl:?} \
                 must grow in this order"
            ));
        }
        Limits {
            min_ttl,
            default_ttl,
            max_ttl,
        }
    }
}

/// DNS names and addresses, and those that go without saying.
fn service_names(text: &str, listen: IpAddr) -> Result<Vec<SanType>, String> {
    let mut names = vec![SanType::DnsName(
        "localhost".try_into().map_err(|_| "localhost".to_owned())?,
    )];
    let mut addresses = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    if !listen.is_unspecified() && !listen.is_loopback() {
        addresses.push(listen);
    }
    for name in text.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        if let Ok(address) = name.parse() {
            addresses.push(address);
            continue;
        }
        let usable = |c: char| c.is_ascii_alphanumeric() || ".-_*".contains(c);
        let name = name.chars().all(usable).then(|| name.try_into().ok());
        let name = name.flatten();
        names.push(SanType::DnsName(name.ok_or(
            "DNS names and addresses are needed, separated by commas",
        )?));
    }
    names.extend(addresses.into_iter().map(SanType::IpAddress));
    Ok(names)
}

#[cfg(test)]
mod tests;
