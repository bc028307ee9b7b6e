//! PeerAuthentication: which policy decides, and the modes of single ports.

use super::*;

fn peer(name: &str, spec: &str) -> Doc {
    policy("PeerAuthentication", name, spec)
}

fn at(mode: &str) -> String {
    format!("mtls: {{mode: {mode}}}")
}

fn selecting(mode: &str) -> String {
    format!("{{selector: {{matchLabels: {{app: db}}}}, mtls: {{mode: {mode}}}}}")
}

/// The modes in the order in which they are listed below; `-` is "no such policy".
const MODES: [&str; 5] = ["-", "UNSET", "DISABLE", "PERMISSIVE", "STRICT"];

#[test]
fn narrowest_level_with_a_mode_decides() {
    for mesh in MODES {
        for namespace in MODES {
            for workload in MODES {
                let mut policies = Vec::new();
                if mesh != "-" {
                    policies.push(peer("istio-system/m", &at(mesh)));
                }
                if namespace != "-" {
                    policies.push(peer("shop/n", &at(namespace)));
                }
                if workload != "-" {
                    policies.push(peer("shop/w", &selecting(workload)));
                }
                let levels = [
                    (workload, "shop/w"),
                    (namespace, "shop/n"),
                    (mesh, "istio-system/m"),
                ];
                let set = levels
                    .into_iter()
                    .find(|(mode, _)| !matches!(*mode, "-" | "UNSET"));
                let expected = set
                    .filter(|(mode, _)| *mode == "STRICT")
                    .map(|(_, name)| format!("PeerAuthentication {name}"));
                let fixture = fixture(&policies);
                assert_eq!(
                    fixture.denial("shop/db", PLAIN),
                    expected,
                    "{mesh} {namespace} {workload}"
                );
                assert_eq!(
                    fixture.denial("shop/db", WEB),
                    None,
                    "a verified identity is always accepted"
                );
            }
        }
    }
}

#[test]
fn level_applies_only_to_its_own_pods() {
    let fixture = fixture(&[
        peer("shop/n", &at("STRICT")),
        peer("bank/w", &selecting("STRICT")),
    ]);
    let strict = |pod| !fixture.allows(pod, PLAIN);
    assert!(strict("shop/web") && strict("shop/db"));
    assert!(!strict("bank/web") && !strict("istio-system/gate"));
}

#[test]
fn oldest_policy_of_a_level_counts_then_first_by_name() {
    let created = |doc: Doc, time: &str| doc.set("metadata.creationTimestamp", time);
    type Spec = fn(&str) -> String;
    let levels: [(&str, Spec); 3] = [("istio-system", at), ("shop", at), ("shop", selecting)];
    for (namespace, spec) in levels {
        let old = |name: &str, mode| {
            created(
                peer(&format!("{namespace}/{name}"), &spec(mode)),
                "2024-01-01T00:00:00Z",
            )
        };
        let new = |name: &str, mode| {
            created(
                peer(&format!("{namespace}/{name}"), &spec(mode)),
                "2025-01-01T00:00:00Z",
            )
        };
        let strict = |policies: &[Doc]| !fixture(policies).allows("shop/db", PLAIN);
        assert!(strict(&[old("z", "STRICT"), new("a", "PERMISSIVE")]));
        assert!(!strict(&[old("z", "PERMISSIVE"), new("a", "STRICT")]));
        assert!(strict(&[old("a", "STRICT"), old("b", "PERMISSIVE")]));
        assert!(!strict(&[old("a", "PERMISSIVE"), old("b", "STRICT")]));
        let timeless = peer(&format!("{namespace}/y"), &spec("STRICT"));
        assert!(
            strict(&[timeless, old("a", "PERMISSIVE")]),
            "without a time it is the oldest"
        );
    }
}

#[test]
fn port_mode_overrides_the_workload_mode() {
    let inherited = [
        ("UNSET", "-", false),
        ("UNSET", "STRICT", true),
        ("UNSET", "PERMISSIVE", false),
        ("STRICT", "-", true),
        ("STRICT", "PERMISSIVE", true),
        ("PERMISSIVE", "STRICT", false),
        ("DISABLE", "STRICT", false),
    ];
    for (workload, namespace, strict) in inherited {
        for (port, mode) in [
            ("STRICT", Some(true)),
            ("PERMISSIVE", Some(false)),
            ("DISABLE", Some(false)),
            ("UNSET", None),
        ] {
            let spec = format!(
                "{{selector: {{matchLabels: {{app: db}}}}, mtls: {{mode: {workload}}}, portLevelMtls: {{9090: {{mode: {port}}}}}}}"
            );
            let mut policies = vec![peer("shop/w", &spec)];
            if namespace != "-" {
                policies.push(peer("shop/n", &at(namespace)));
            }
            let fixture = fixture(&policies);
            let refused = |port: u16| !fixture.allows("shop/db", &format!("- 192.0.2.7 {port}"));
            assert_eq!(
                refused(9090),
                mode.unwrap_or(strict),
                "{workload} {namespace} {port}"
            );
            assert_eq!(
                refused(8080),
                strict,
                "{workload} {namespace}: another port"
            );
            assert!(fixture.allows("shop/db", "cluster.local/ns/x/sa/y 192.0.2.7 9090"));
        }
    }
}

/// Istio once put the ports of one policy together so that two strict ones cancelled each other:
/// no port is both 8080 and 9090, and all became permissive (istio/istio 54146).
#[test]
fn each_of_several_strict_ports_is_strict() {
    for top in [
        "",
        "mtls: {mode: PERMISSIVE}, ",
        "mtls: {mode: DISABLE}, ",
        "mtls: {mode: UNSET}, ",
    ] {
        let spec = format!(
            "{{selector: {{matchLabels: {{app: db}}}}, {top}portLevelMtls: \
             {{8080: {{mode: STRICT}}, 9090: {{mode: STRICT}}, 7070: {{mode: PERMISSIVE}}}}}}"
        );
        let fixture = fixture(&[peer("shop/w", &spec)]);
        let denial = Some("PeerAuthentication shop/w".to_owned());
        for port in [8080, 9090] {
            assert_eq!(
                fixture.denial("shop/db", &format!("- 192.0.2.7 {port}")),
                denial,
                "{top}{port}"
            );
        }
        for port in [7070, 80] {
            assert_eq!(
                fixture.denial("shop/db", &format!("- 192.0.2.7 {port}")),
                None,
                "{top}{port}"
            );
        }
    }
}

/// The opposite: any number of exceptions to STRICT leaves every other port strict.
#[test]
fn each_of_several_permissive_ports_is_permissive() {
    for policies in [
        vec![peer(
            "shop/w",
            "{selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}, 9090: {mode: DISABLE}, 7070: {mode: STRICT}}}",
        )],
        vec![
            peer("istio-system/m", &at("STRICT")),
            peer(
                "shop/w",
                "{selector: {matchLabels: {app: db}}, portLevelMtls: {8080: {mode: PERMISSIVE}, 9090: {mode: DISABLE}, 7070: {mode: STRICT}}}",
            ),
        ],
    ] {
        let fixture = fixture(&policies);
        let open: Vec<u16> = [80, 7070, 8080, 9090]
            .into_iter()
            .filter(|port| fixture.allows("shop/db", &format!("- 192.0.2.7 {port}")))
            .collect();
        assert_eq!(open, [8080, 9090]);
    }
}

#[test]
fn selector_in_the_root_namespace_selects_nothing_and_is_reported() {
    let spec = "{selector: {matchLabels: {app: gate}}, mtls: {mode: STRICT}}";
    let fixture = fixture(&[peer("istio-system/s", spec)]);
    assert!(fixture.allows("istio-system/gate", PLAIN));
    assert_eq!(
        fixture.report("istio-system/s").state,
        PolicyState::NotEnforcedHere
    );
}

#[test]
fn invalid_policy_is_strict_and_overrides_the_others() {
    let select = "selector: {matchLabels: {app: db}}";
    let errors = [
        ("mtls: {mode: strict}", "unknown_mode@spec.mtls.mode"),
        ("mtls: {mode: MUTUAL}", "unknown_mode@spec.mtls.mode"),
        ("mtls: {mode: 1}", "unknown_mode@spec.mtls.mode"),
        ("mtls: {mode: null}", "unknown_mode@spec.mtls.mode"),
        ("mtls: PERMISSIVE", "bad_field@spec.mtls"),
        ("mtls: null", "bad_field@spec.mtls"),
        (
            "mtls: {mode: PERMISSIVE, future: 1}",
            "unknown_field@spec.mtls.future",
        ),
        (
            "{mtls: {mode: PERMISSIVE}, future: 1}",
            "unknown_field@spec.future",
        ),
        (
            "{mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {mode: STRICT}}}",
            "port_without_selector@spec.portLevelMtls",
        ),
        (
            "{SELECT, mtls: {mode: PERMISSIVE}, portLevelMtls: {}}",
            "bad_field@spec.portLevelMtls",
        ),
        (
            "{SELECT, mtls: {mode: PERMISSIVE}, portLevelMtls: []}",
            "bad_field@spec.portLevelMtls",
        ),
        (
            "{SELECT, mtls: {mode: PERMISSIVE}, portLevelMtls: {0: {mode: STRICT}}}",
            "bad_port@spec.portLevelMtls.0",
        ),
        (
            "{SELECT, mtls: {mode: PERMISSIVE}, portLevelMtls: {65536: {}}}",
            "bad_port@spec.portLevelMtls.65536",
        ),
        (
            "{SELECT, mtls: {mode: PERMISSIVE}, portLevelMtls: {http: {mode: STRICT}}}",
            "bad_port@spec.portLevelMtls.http",
        ),
        (
            "{SELECT, mtls: {mode: PERMISSIVE}, portLevelMtls: {80: {mode: OPEN}}}",
            "unknown_mode@spec.portLevelMtls.80.mode",
        ),
        (
            "{SELECT, mtls: {mode: PERMISSIVE}, portLevelMtls: {80: STRICT}}",
            "bad_field@spec.portLevelMtls.80",
        ),
        (
            "{selector: {matchLabels: [db]}, mtls: {mode: PERMISSIVE}}",
            "bad_field@spec.selector.matchLabels",
        ),
        (
            "{selector: {matchLabels: {app: 'd*'}}, mtls: {mode: PERMISSIVE}}",
            "bad_label@spec.selector.matchLabels.app",
        ),
        (
            "{selector: {matchExpressions: []}, mtls: {mode: PERMISSIVE}}",
            "unknown_field@spec.selector.matchExpressions",
        ),
    ];
    let permissive = [
        peer("istio-system/a", &at("PERMISSIVE")),
        peer("shop/a", &at("PERMISSIVE")),
        peer(
            "shop/b",
            "{selector: {matchLabels: {app: db}}, mtls: {mode: PERMISSIVE}, portLevelMtls: {8080: {mode: PERMISSIVE}}}",
        ),
    ];
    for (spec, error) in errors {
        let policy = peer("shop/z", &spec.replace("SELECT", select));
        let fixture = fixture(&[&permissive[..], &[policy]].concat());
        assert_eq!(
            fixture.denial("shop/db", PLAIN).as_deref(),
            Some("PeerAuthentication shop/z"),
            "{spec}"
        );
        assert_eq!(
            fixture.report("shop/z").state,
            PolicyState::Invalid,
            "{spec}"
        );
        assert_eq!(fixture.messages("shop/z"), [error], "{spec}");
        assert!(fixture.allows("bank/web", PLAIN), "{spec}");
    }
}
