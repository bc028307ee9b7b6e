//! The command line of `ambit ca`: flags, environment variables, defaults. All mistakes are reported
//! together.

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
/// Istio's audience of tokens for a certificate authority.
const AUDIENCE: &str = "istio-ca";
/// Istio's default.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 3600);
/// A leaked key can be used for as long as this.
const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// The shortest lifetime that leaves time to renew, at its half.
const MIN_TTL: Duration = Duration::from_secs(10);
/// Long enough for an open request; Kubernetes grants 30 s.
const TERMINATION_DEADLINE: Duration = Duration::from_secs(5);
/// Istio's ports of this protocol and of its metrics; readiness is the port after them.
const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 15012);
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 15014);
const READINESS: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 15015);

/// The command line before its values are parsed. Values stay text here, so that all mistakes are
/// reported together.
#[derive(Debug, Default, Args)]
pub struct CaArguments {
    /// Folder of the authority in Istio's layout of `cacerts`: root-cert.pem, ca-key.pem, and
    /// ca-cert.pem and cert-chain.pem if the root itself does not sign. If it is empty at the first
    /// start, a new root is created; changes are followed
    #[arg(long, env = "AMBIT_CA_DIR")]
    dir: Option<PathBuf>,
    /// Folder of the state that a replacement of roots needs, private keys included [default:
    /// `state` in the authority's folder]
    #[arg(long, env = "AMBIT_CA_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// File with the public keys that verify callers' tokens, PEM; changes are followed
    #[arg(long, env = "AMBIT_CA_TOKEN_KEY")]
    token_key: Option<PathBuf>,
    /// Audience that tokens must have [default: istio-ca]
    #[arg(long, env = "AMBIT_CA_AUDIENCE")]
    audience: Option<String>,
    /// Trust domain of the identities in certificates [default: cluster.local]
    #[arg(long, env = "TRUST_DOMAIN")]
    trust_domain: Option<String>,
    /// DNS names and addresses that callers connect to, separated by commas. The listen address,
    /// localhost and the loopback addresses are always included
    #[arg(long, env = "AMBIT_CA_NAMES", alias = "dns-name")]
    names: Option<String>,
    /// Lifetime of a certificate whose request has none [default: 24h, or --max-ttl if shorter]
    #[arg(long, env = "DEFAULT_WORKLOAD_CERT_TTL")]
    default_ttl: Option<String>,
    /// Maximum lifetime of a certificate; longer requests are cut [default: 24h]
    #[arg(long, env = "MAX_WORKLOAD_CERT_TTL")]
    max_ttl: Option<String>,
    /// Minimum lifetime of a certificate; shorter requests are refused [default: 10s]
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
    /// How long open requests may continue after a signal to stop [default: 5s]
    #[arg(long, env = "AMBIT_CA_TERMINATION_DEADLINE")]
    termination_deadline: Option<String>,
    /// plain or json [default: plain]
    #[arg(long, env = "LOG_FORMAT")]
    log_format: Option<String>,
    /// Log levels, such as info or info,access=off [default: info]
    #[arg(long, env = "RUST_LOG")]
    log_level: Option<String>,
}

/// Bounds of the lifetime of certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TtlLimits {
    /// Requests for a shorter lifetime are refused.
    pub min: Duration,
    /// For requests without a lifetime.
    pub default: Duration,
    /// Longer lifetimes are cut to this.
    pub max: Duration,
}

impl Default for TtlLimits {
    fn default() -> Self {
        Self {
            min: MIN_TTL,
            default: DEFAULT_TTL,
            max: MAX_TTL,
        }
    }
}

/// The configuration: complete and checked.
#[derive(Clone, Debug)]
pub struct CaConfig {
    /// Folder of the authority.
    pub dir: PathBuf,
    /// Folder of its state.
    pub state_dir: PathBuf,
    /// File with the public keys that verify tokens.
    pub token_key: PathBuf,
    /// Audience that tokens must have.
    pub audience: String,
    /// Trust domain of the identities in certificates.
    pub trust_domain: TrustDomain,
    /// Names in the certificate of the service.
    pub names: Vec<SanType>,
    /// Bounds of the lifetime of certificates.
    pub ttl_limits: TtlLimits,
    /// Address of the service.
    pub listen: SocketAddr,
    /// Address of the metrics.
    pub metrics: SocketAddr,
    /// Address of the readiness page.
    pub readiness: SocketAddr,
    /// How long open requests may continue after a signal to stop.
    pub termination_deadline: Duration,
    /// Format and levels of the log.
    pub log: LogConfig,
}

impl CaConfig {
    /// Parses and checks the command line.
    ///
    /// # Errors
    /// Fails with every missing and every malformed value.
    pub fn from_arguments(arguments: CaArguments) -> Result<Self, ConfigError> {
        let mut errors = FlagErrors::default();
        let dir = errors.required("--dir (AMBIT_CA_DIR)", arguments.dir);
        let ttl_limits = ttl_limits(
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
            ttl_limits,
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
}

fn ttl_limits(
    errors: &mut FlagErrors,
    min: Option<String>,
    default: Option<String>,
    max: Option<String>,
) -> TtlLimits {
    let parse = |text: &str| duration(text, Duration::from_secs(1));
    let min = errors.parse("--min-ttl", min, MIN_TTL, parse);
    let max = errors.parse("--max-ttl", max, MAX_TTL, parse);
    let default = errors.parse("--default-ttl", default, DEFAULT_TTL.min(max), parse);
    if min > default || default > max {
        errors.push(format!(
            "--min-ttl {min:?}, --default-ttl {default:?} and --max-ttl {max:?} must grow in this \
             order"
        ));
    }
    TtlLimits { min, default, max }
}

/// Parses DNS names and addresses separated by commas. Adds `localhost`, the loopback addresses and
/// the listen address.
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
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || ".-_*".contains(c);
        let name = name.chars().all(is_allowed).then(|| name.try_into().ok());
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
