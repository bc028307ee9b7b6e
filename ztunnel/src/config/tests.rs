use super::*;

/// Arguments with all required flags, independent of this process's environment.
fn complete() -> Arguments {
    Arguments {
        node_name: Some("a".into()),
        source_folder: Some("/objects".into()),
        ca_dir: Some("/ca".into()),
        netns_dir: Some("/netns".into()),
        ..Arguments::default()
    }
}

#[test]
fn unset_flags_have_defaults() {
    let config = Config::from_arguments(complete()).expect("a complete configuration");
    assert_eq!(&*config.mesh.cluster, "Kubernetes");
    assert_eq!(config.mesh.trust_domain.to_string(), "cluster.local");
    assert_eq!(config.termination_deadline, Duration::from_secs(5));
    assert_eq!(config.cert_ttl, Duration::from_secs(86_400));
    assert_eq!(config.verify_interval, Duration::from_secs(2));
    assert_eq!(config.admin.to_string(), "127.0.0.1:15000");
    assert_eq!(config.stats.to_string(), "[::]:15020");
    assert_eq!(config.readiness.to_string(), "[::]:15021");
    assert_eq!(config.log.filter, "info");
    assert!(config.mesh.excluded_namespaces.contains("kube-system"));
    assert!(config.workers >= 1);
}

#[test]
fn all_mistakes_are_reported_together() {
    let arguments = Arguments {
        ca_dir: None,
        netns_dir: None,
        termination_deadline: Some("5".into()),
        cert_ttl: Some("1s".into()),
        worker_threads: Some("many".into()),
        trust_domain: Some("not a domain".into()),
        log_format: Some("xml".into()),
        admin_addr: Some("0.0.0.0:15000".into()),
        ..complete()
    };
    let message = Config::from_arguments(arguments)
        .expect_err("eight mistakes")
        .to_string();
    for flag in [
        "one of --ca-dir (AMBIT_CA_DIR), --ca-address (CA_ADDRESS) and --spire-socket (AMBIT_SPIRE_SOCKET) is required",
        "--netns-dir (AMBIT_NETNS_DIR) is required",
        "--termination-deadline \"5\"",
        "--cert-ttl \"1s\": it must be at least 10s",
        "--worker-threads \"many\"",
        "--trust-domain \"not a domain\"",
        "--log-format \"xml\"",
        "--admin-addr \"0.0.0.0:15000\": it must be a loopback address",
    ] {
        assert!(message.contains(flag), "{flag} is not in\n{message}");
    }
    assert_eq!(message.lines().count(), 9, "{message}");
}

#[test]
fn exactly_one_identity_provider_is_accepted() {
    let two = Arguments {
        spire_socket: Some("/run/spire.sock".into()),
        ..complete()
    };
    let message = Config::from_arguments(two)
        .expect_err("two providers")
        .to_string();
    let flags =
        "only one may be given of --ca-dir (AMBIT_CA_DIR), --spire-socket (AMBIT_SPIRE_SOCKET)";
    assert!(message.contains(flags), "{message}");
    let istio = Arguments {
        ca_dir: None,
        ca_address: Some("https://ca.mesh.svc:15012".into()),
        ca_root_cert: Some("/root.pem".into()),
        ca_token: Some("/token".into()),
        ..complete()
    };
    let config = Config::from_arguments(istio).expect("a complete configuration");
    let expected = IdentityProvider::IstioCa {
        address: "ca.mesh.svc:15012".into(),
        root_cert: "/root.pem".into(),
        token: "/token".into(),
        server_name: None,
    };
    assert_eq!(config.identities, expected);
}

#[test]
fn certificate_authority_needs_address_root_and_token() {
    let arguments = Arguments {
        ca_dir: None,
        ca_address: Some("ca.mesh.svc".into()),
        ..complete()
    };
    let message = Config::from_arguments(arguments)
        .expect_err("three mistakes")
        .to_string();
    for flag in ["--ca-address", "--ca-root-cert", "--ca-token"] {
        assert!(message.contains(flag), "{flag} is not in\n{message}");
    }
}

#[test]
fn errors_of_the_authority_client_are_reported_with_all_others() {
    let arguments = Arguments {
        node_name: None,
        ca_dir: None,
        ca_address: Some("http://ca.mesh.svc:15012".into()),
        ca_root_cert: Some("/root.pem".into()),
        ca_token: Some("/token".into()),
        ca_server_name: Some("no name".into()),
        cluster_id: Some("a\nb".into()),
        ..complete()
    };
    let message = Config::from_arguments(arguments)
        .expect_err("four mistakes")
        .to_string();
    for flag in [
        "--node-name (NODE_NAME) is required",
        "--ca-address (CA_ADDRESS): ",
        "--ca-server-name (ALT_CA_HOSTNAME): \"no name\"",
        "--cluster-id (CLUSTER_ID): ",
    ] {
        assert!(message.contains(flag), "{flag} is not in\n{message}");
    }
    assert_eq!(message.lines().count(), 5, "{message}");
}

#[test]
fn empty_value_is_an_error() {
    let arguments = Arguments {
        node_name: Some(String::new()),
        source_folder: Some("".into()),
        cluster_id: Some(String::new()),
        log_level: Some(String::new()),
        crl_path: Some("".into()),
        // An empty list is a valid list.
        excluded_namespaces: Some(String::new()),
        ..complete()
    };
    let message = Config::from_arguments(arguments)
        .expect_err("five mistakes")
        .to_string();
    for flag in [
        "--node-name (NODE_NAME) is empty",
        "--source-folder (AMBIT_SOURCE_FOLDER) is empty",
        "--cluster-id (CLUSTER_ID) is empty",
        "--log-level (RUST_LOG) is empty",
        "--crl-path (CRL_PATH) is empty",
    ] {
        assert!(message.contains(flag), "{flag} is not in\n{message}");
    }
    assert_eq!(message.lines().count(), 6, "{message}");
}

#[test]
fn policy_defaults_are_istios_root_namespace_and_enforced_network_policies() {
    let config = Config::from_arguments(complete()).expect("a complete configuration");
    assert_eq!(&*config.mesh.root_namespace, "istio-system");
    assert!(config.mesh.network_policy);
    assert!(config.mesh.trust_domain_aliases.is_empty());
    let arguments = Arguments {
        network_policy: Some("off".into()),
        trust_domain_aliases: Some("old.example, older.example".into()),
        ..complete()
    };
    let config = Config::from_arguments(arguments).expect("a complete configuration");
    assert!(!config.mesh.network_policy);
    assert_eq!(config.mesh.trust_domain_aliases.len(), 2);
}

#[test]
fn clap_definition_is_consistent() {
    use clap::CommandFactory;
    Arguments::command().debug_assert();
}
