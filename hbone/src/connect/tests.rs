use proptest::prelude::*;

use super::*;

fn host_name() -> impl Strategy<Value = String> {
    "[a-z]([a-z0-9_-]{0,10}[a-z0-9])?(\\.[a-z]([a-z0-9-]{0,10}[a-z0-9])?){0,3}"
}

fn authority() -> impl Strategy<Value = Authority> {
    prop_oneof![
        (any::<std::net::IpAddr>(), 1u16..)
            .prop_map(|(ip, port)| Authority::Address((ip, port).into())),
        (host_name(), 1u16..).prop_map(|(name, port)| Authority::Host { name, port }),
    ]
}

fn value() -> impl Strategy<Value = Option<String>> {
    proptest::option::of("[ -~äß]{1,40}")
}

fn baggage() -> impl Strategy<Value = Baggage> {
    let kind = prop_oneof![
        Just("deployment"),
        Just("pod"),
        Just("job"),
        Just("cronjob")
    ];
    let workload = proptest::option::of((kind, "[ -~]{1,40}"));
    (
        value(),
        value(),
        workload,
        value(),
        value(),
        value(),
        value(),
    )
        .prop_map(
            |(cluster, namespace, workload, service_name, service_version, region, zone)| Baggage {
                cluster,
                namespace,
                workload_type: workload.as_ref().map(|(kind, _)| (*kind).to_owned()),
                workload_name: workload.map(|(_, name)| name),
                service_name,
                service_version,
                region,
                zone,
            },
        )
}

proptest! {
    #[test]
    fn authority_round_trips(authority in authority()) {
        prop_assert_eq!(authority.to_string().parse(), Ok(authority));
    }

    #[test]
    fn baggage_round_trips(baggage in baggage()) {
        prop_assert_eq!(Baggage::parse(&baggage.to_string()), baggage);
    }

    #[test]
    fn forwarded_round_trips(ip: std::net::IpAddr, port in 1u16.., host in proptest::option::of(host_name())) {
        let forwarded = Forwarded { for_: (ip, port).into(), host };
        prop_assert_eq!(forwarded.to_string().parse(), Ok(forwarded));
    }

    #[test]
    fn traceparent_round_trips(trace in 1u128.., span in 1u64..) {
        let parent = TraceParent(trace.to_be_bytes(), span.to_be_bytes());
        prop_assert_eq!(parent.to_string().parse(), Ok(parent));
    }

    #[test]
    fn arbitrary_strings_never_panic(s in "\\PC{0,200}") {
        let _ = s.parse::<Authority>();
        let _ = s.parse::<Forwarded>();
        let _ = s.parse::<TraceParent>();
        let _ = Baggage::parse(&s);
    }

    #[test]
    fn parsed_host_authority_prints_unchanged(s in "[a-z0-9.:\\[\\]%@/-]{0,24}") {
        if let Ok(Authority::Host { name, port }) = s.parse() {
            prop_assert_eq!(format!("{name}:{port}"), s);
        }
    }
}

#[test]
fn malformed_authority_is_rejected() {
    let long = format!("{}:80", "a".repeat(254));
    let label = format!("{}.b:80", "a".repeat(64));
    for bad in [
        "",
        ":",
        "a",
        "a:",
        ":80",
        "a:0",
        "a:080",
        "a:65536",
        "a:+80",
        "a: 80",
        "a:80 ",
        "1.2.3:80",
        "1.2.3.4.5:80",
        "01.2.3.4:80",
        "256.1.1.1:80",
        "::1:80",
        "[::1:80",
        "[::1%lo]:80",
        "[1.2.3.4]:80",
        "[]:80",
        "user@a:80",
        "a/b:80",
        "a..b:80",
        ".a:80",
        "a.:80",
        "-a:80",
        "a-:80",
        "ä:80",
        "a\0b:80",
        "http://a:80",
        &long,
        &label,
    ] {
        assert!(bad.parse::<Authority>().is_err(), "{bad:?} was accepted");
    }
}

#[test]
fn ipv6_scope_id_is_not_printed() {
    let scoped = std::net::SocketAddrV6::new(std::net::Ipv6Addr::LOCALHOST, 80, 7, 3);
    assert_eq!(
        Authority::from(std::net::SocketAddr::V6(scoped)).to_string(),
        "[::1]:80"
    );
}

#[test]
fn istio_baggage_is_parsed_and_printed_unchanged() {
    let text = "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=web,\
                service.name=web,service.version=v1,cloud.region=r,cloud.availability_zone=z";
    let baggage = Baggage::parse(text);
    assert_eq!(baggage.workload_type.as_deref(), Some("deployment"));
    assert_eq!(baggage.workload_name.as_deref(), Some("web"));
    assert_eq!(baggage.zone.as_deref(), Some("z"));
    assert_eq!(baggage.to_string(), text);
}

#[test]
fn unusable_baggage_members_are_ignored() {
    let text = "x=y,,=,k8s.namespace.name,k8s.cluster.name=,service.name=a%0ab,cloud.region=%zz,\
                k8s.namespace.name = a ;p=1,k8s.namespace.name=b,k8s.node.name=n";
    let expected = Baggage {
        namespace: Some("a".into()),
        ..Baggage::default()
    };
    assert_eq!(Baggage::parse(text), expected);
    let long = format!("service.name={}", "a".repeat(254));
    assert_eq!(Baggage::parse(&long), Baggage::default());
    let huge = format!("service.name=a,{}", "x=y,".repeat(4096));
    assert_eq!(Baggage::parse(&huge), Baggage::default());
}

#[test]
fn baggage_value_cannot_inject_a_member() {
    let baggage = Baggage {
        cluster: Some("a,k8s.namespace.name=b;\r\n\"".into()),
        ..Baggage::default()
    };
    let text = baggage.to_string();
    assert!(!text.contains([',', ';', '\r', '\n', '"']), "{text}");
}

#[test]
fn forwarded_accepts_istio_format_and_rejects_ambiguous_values() {
    let both: Forwarded = "for=\"10.0.0.1:4711\";host=web.default.svc"
        .parse()
        .unwrap();
    assert_eq!(both.host.as_deref(), Some("web.default.svc"));
    assert!("For=10.0.0.1:80;proto=http".parse::<Forwarded>().is_ok());
    assert!("for=\"[::1]:80\"".parse::<Forwarded>().is_ok());
    for bad in [
        "",
        "for",
        "for=",
        "for=unknown",
        "for=_x",
        "for=10.0.0.1",
        "host=a",
        "for=\"1.2.3.4:1",
        "for=1.2.3.4:1;for=1.2.3.4:2",
        "for=1.2.3.4:1, for=1.2.3.4:2",
        "for=1.2.3.4:1;host=a\\b",
        "for=1.2.3.4:1;host=",
    ] {
        assert!(bad.parse::<Forwarded>().is_err(), "{bad:?} was accepted");
    }
}

#[test]
fn traceparent_follows_w3c_trace_context() {
    let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    assert_eq!(
        good.parse::<TraceParent>().unwrap().to_string(),
        good.replace("-01", "-00")
    );
    assert!(good.replacen("00", "01", 1).parse::<TraceParent>().is_ok());
    assert!(
        format!("{}-more", good.replacen("00", "01", 1))
            .parse::<TraceParent>()
            .is_ok()
    );
    for bad in [
        good.replacen("00", "ff", 1),
        good.to_uppercase(),
        format!("{good}-more"),
        good[..54].to_owned(),
        good.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
        good.replace('-', "_"),
    ] {
        assert!(bad.parse::<TraceParent>().is_err(), "{bad:?} was accepted");
    }
    assert_ne!(TraceParent::random(), TraceParent::random());
}
