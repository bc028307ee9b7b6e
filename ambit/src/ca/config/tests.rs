use clap::{Command, FromArgMatches};

use super::*;

fn understood(arguments: &[&str]) -> Result<CaConfig, String> {
    let command = CaArguments::augment_args(Command::new("ca"));
    let all = ["ca"].iter().chain(arguments);
    let matches = command.try_get_matches_from(all).unwrap();
    let arguments = CaArguments::from_arg_matches(&matches).unwrap();
    CaConfig::from_arguments(arguments).map_err(|error| error.to_string())
}

#[test]
fn a_folder_and_a_key_are_enough() {
    let config = understood(&["--dir", "/ca", "--token-key", "/key"]).unwrap();
    assert_eq!(config.limits, Limits::default());
    assert_eq!(config.state_dir, PathBuf::from("/ca/state"));
    assert_eq!(config.trust_domain.to_string(), "cluster.local");
    assert_eq!(config.listen.port(), 15012);
}

#[test]
fn everything_that_is_wrong_is_said_at_once() {
    let error = understood(&[
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
    for complaint in [
        "--dir (AMBIT_CA_DIR) is required",
        "--token-key (AMBIT_CA_TOKEN_KEY) is required",
        "--listen \"nowhere\"",
        "--trust-domain \"Not A Domain\"",
        "--max-ttl \"1 day\"",
        "must grow in this order",
        "--names \"a name\"",
        "--log-format \"xml\"",
    ] {
        assert!(error.contains(complaint), "{complaint:?} in {error}");
    }
}

#[test]
fn a_shorter_maximum_takes_the_default_along() {
    let config = understood(&["--dir", "/ca", "--token-key", "/key", "--max-ttl", "1h"]);
    let hour = Duration::from_secs(3600);
    assert_eq!(config.unwrap().limits.default_ttl, hour);
}

#[test]
fn the_service_is_known_by_what_it_is_given_and_by_where_it_listens() {
    let config = understood(&[
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
