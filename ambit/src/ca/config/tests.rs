use clap::{Command, FromArgMatches};

use super::*;

fn parse(arguments: &[&str]) -> Result<CaConfig, String> {
    let command = CaArguments::augment_args(Command::new("ca"));
    let all = ["ca"].iter().chain(arguments);
    let matches = command.try_get_matches_from(all).unwrap();
    let arguments = CaArguments::from_arg_matches(&matches).unwrap();
    CaConfig::from_arguments(arguments).map_err(|error| error.to_string())
}

#[test]
fn folder_and_token_key_are_sufficient() {
    let config = parse(&["--dir", "/ca", "--token-key", "/key"]).unwrap();
    assert_eq!(config.ttl_limits, TtlLimits::default());
    assert_eq!(config.state_dir, PathBuf::from("/ca/state"));
    assert_eq!(config.trust_domain.to_string(), "cluster.local");
    assert_eq!(config.listen.port(), 15012);
}

#[test]
fn all_mistakes_are_reported_together() {
    let error = parse(&[
        "--listen",
        "nowhere",
        "--trust-domain",
        "Not A Domain",
        "--max-ttl",
        "1 day",
        "--min-ttl",
        "48h",
        "--names",
        "a name",
        "--log-format",
        "xml",
    ])
    .unwrap_err();
    for mistake in [
        "--dir (AMBIT_CA_DIR) is required",
        "--token-key (AMBIT_CA_TOKEN_KEY) is required",
        "--listen \"nowhere\"",
        "--trust-domain \"Not A Domain\"",
        "--max-ttl \"1 day\"",
        "must grow in this order",
        "--names \"a name\"",
        "--log-format \"xml\"",
    ] {
        assert!(error.contains(mistake), "{mistake:?} is not in {error}");
    }
}

#[test]
fn shorter_max_ttl_lowers_the_default() {
    let config = parse(&["--dir", "/ca", "--token-key", "/key", "--max-ttl", "1h"]);
    let hour = Duration::from_secs(3600);
    assert_eq!(config.unwrap().ttl_limits.default, hour);
}

#[test]
fn service_names_include_the_listen_address_and_localhost() {
    let config = parse(&[
        "--dir",
        "/ca",
        "--token-key",
        "/key",
        "--listen",
        "10.0.0.9:15012",
        "--names",
        "ca.example, 10.1.1.1",
    ]);
    let names = config.unwrap().names;
    let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
    let address = |text: &str| SanType::IpAddress(text.parse().unwrap());
    for name in [
        dns("localhost"),
        dns("ca.example"),
        address("127.0.0.1"),
        address("::1"),
        address("10.0.0.9"),
        address("10.1.1.1"),
    ] {
        assert!(names.contains(&name), "{name:?}");
    }
}
