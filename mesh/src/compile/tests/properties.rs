//! Properties of arbitrary objects (proptest).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use crate::objects::{Objects, parse};
use crate::testing::{Doc, compiled, namespace, node, objects, params, pod, service, slice};
use crate::{AddressRefusal, Diagnostic, EndpointKey, Model, Route, Store, compile, route};

/// Few names and addresses, so that conflicts are frequent.
fn any_pod() -> impl Strategy<Value = Doc> {
    let mode = prop_oneof![Just("ambient"), Just("none"), Just("typo"), Just("")];
    (0..8u8, 0..6u8, mode, any::<[bool; 5]>(), 0..3u8).prop_map(|(name, ip, mode, flags, node)| {
        let [ready, terminating, host, twin, ended] = flags;
        let mut doc = pod(&format!("web-{name}"), &format!("10.0.0.{ip}"));
        doc = doc.set("spec.nodeName", format!("n{node}"));
        doc = if mode.is_empty() {
            doc
        } else {
            doc.label("istio.io/dataplane-mode", mode)
        };
        doc = if ready { doc } else { doc.not_ready() };
        doc = if terminating { doc.terminating() } else { doc };
        doc = if host && twin {
            doc.set("spec.hostNetwork", true)
        } else {
            doc
        };
        doc = if ended && twin {
            doc.set("status.phase", "Failed")
        } else {
            doc
        };
        if twin && name == 7 {
            doc.set("metadata.uid", "uid-web-6")
        } else {
            doc
        }
    })
}

fn any_service() -> impl Strategy<Value = Doc> {
    let target = prop_oneof![Just(json!(8080)), Just(json!("http")), Just(json!("none"))];
    let distribution = prop_oneof![Just(""), Just("PreferClose"), Just("PreferSameNode")];
    (0..3u8, 0..8u8, target, distribution, any::<[bool; 4]>()).prop_map(
        |(name, vip, target, distribution, [selects, local, sticky, publish])| {
            let mut doc = service(
                ["web", "db", "x"][usize::from(name)],
                &format!("10.0.0.{vip}"),
            )
            .set("spec.ports.0.targetPort", target)
            .set("spec.trafficDistribution", distribution)
            .set("spec.publishNotReadyAddresses", publish);
            if !selects {
                doc.0["spec"]
                    .as_object_mut()
                    .expect("it has a spec")
                    .remove("selector");
            }
            doc = if local {
                doc.set("spec.internalTrafficPolicy", "Local")
            } else {
                doc
            };
            if sticky {
                doc.set("spec.sessionAffinity", "ClientIP")
            } else {
                doc
            }
        },
    )
}

fn any_slice() -> impl Strategy<Value = Doc> {
    let endpoint = (0..10u8, 0..9u8, any::<[bool; 4]>()).prop_map(|(ip, name, flags)| {
        let [ready, serving, terminating, named] = flags;
        let conditions = json!({"ready": ready, "serving": serving, "terminating": terminating});
        let mut endpoint = json!({"addresses": [format!("10.0.0.{ip}")], "conditions": conditions});
        if named {
            endpoint["targetRef"] = json!({"kind": "Pod", "name": format!("web-{name}")});
        }
        endpoint
    });
    (0..4u8, 0..3u8, prop::collection::vec(endpoint, 0..4)).prop_map(|(name, of, endpoints)| {
        slice(
            &format!("s{name}"),
            ["web", "db", "x"][usize::from(of)],
            json!(endpoints),
        )
    })
}

/// Objects with distinct names, and with conflicting addresses and uids.
fn any_fixture() -> impl Strategy<Value = Vec<Doc>> {
    let pods = prop::collection::vec(any_pod(), 0..8);
    let services = prop::collection::vec(any_service(), 0..4);
    let slices = prop::collection::vec(any_slice(), 0..4);
    (pods, services, slices, any::<bool>()).prop_map(|(pods, services, slices, ambient)| {
        let mut fixture = vec![
            namespace("shop"),
            node("n0", "eu", "a"),
            node("n1", "eu", "b"),
        ];
        fixture[0] = if ambient {
            fixture[0].clone().ambient()
        } else {
            fixture[0].clone()
        };
        for doc in pods.into_iter().chain(services).chain(slices) {
            let known = |other: &Doc| {
                other.0["kind"] == doc.0["kind"]
                    && other.0["metadata"]["name"] == doc.0["metadata"]["name"]
            };
            if !fixture.iter().any(known) {
                fixture.push(doc);
            }
        }
        fixture
    })
}

/// Objects that cannot be read, or whose identity is not certain.
fn any_invalid() -> impl Strategy<Value = Doc> {
    prop_oneof![
        any_pod().prop_map(|doc| doc.set("spec.serviceAccountName", "../admin")),
        any_pod().prop_map(|doc| doc.set("metadata.uid", "../x")),
        any_pod().prop_map(|doc| doc.set("metadata.name", "UPPER")),
        any_pod().prop_map(|doc| doc.set("metadata.namespace", "a/b")),
        any_service().prop_map(|doc| doc.set("metadata.name", "no name")),
        any_slice().prop_map(|doc| doc
            .set("metadata.name", "no/name")
            .set("addressType", "FQDN")),
    ]
}

fn spread(docs: &[Doc], files: usize) -> Objects {
    let mut all = Objects::default();
    for (i, doc) in docs.iter().enumerate().rev() {
        let file: Arc<str> = format!("{}.yaml", i % files).into();
        let parsed = parse(&file, doc.0.to_string().as_bytes());
        parsed
            .objects
            .into_iter()
            .for_each(|(object, origin)| all.insert(object, origin));
    }
    all
}

fn sorted(diagnostics: &[Diagnostic]) -> Vec<String> {
    let mut texts: Vec<_> = diagnostics
        .iter()
        .map(|p| format!("{:?} {} {}", p.object, p.code, p.message))
        .collect();
    texts.sort();
    texts
}

fn newly_refused(before: &Model, after: &Model) -> Vec<IpAddr> {
    after
        .refused_addresses
        .keys()
        .filter(|ip| before.address_refusal(**ip).is_none())
        .copied()
        .collect()
}

fn drop_bare_endpoints(model: &mut Model, refused: &[IpAddr]) {
    let services = model.services.values_mut().chain(model.by_vip.values_mut());
    for service in services {
        Arc::make_mut(service).endpoints.retain(
            |endpoint| !matches!(endpoint.key(), EndpointKey::Address(ip) if refused.contains(&ip)),
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    #[test]
    fn model_does_not_depend_on_files_and_order(
        fixture in any_fixture().prop_shuffle(), files in 1..5usize,
    ) {
        let (model, diagnostics) = compiled(&fixture);
        let (other, others) = compile(&spread(&fixture, files), &params());
        prop_assert_eq!(&model, &other);
        prop_assert_eq!(sorted(&diagnostics), sorted(&others));
    }

    #[test]
    fn invalid_object_does_not_affect_others(
        fixture in any_fixture(), invalid in any_invalid(),
    ) {
        let (mut before, _) = compiled(&fixture);
        let (mut after, _) = compiled(&[&fixture[..], &[invalid]].concat());
        // It may only refuse addresses without an owner. An endpoint with such an address is removed
        // too: it may be the invalid pod, which may be meshed.
        let refused = newly_refused(&before, &after);
        prop_assert!(refused.iter().all(|ip| before.workload_by_ip(*ip).is_none()));
        prop_assert!(refused.iter().all(|ip| before.service_by_vip(*ip).is_none()));
        after.refused_addresses.retain(|ip, _| !refused.contains(ip));
        prop_assert!(before.refused_addresses.keys().all(|ip| after.refused_addresses.contains_key(ip)));
        // The reason of a refusal may change, but not the refusal.
        after.refused_addresses.clone_from(&before.refused_addresses);
        drop_bare_endpoints(&mut before, &refused);
        prop_assert_eq!(before, after);
    }

    #[test]
    fn updated_store_equals_a_fresh_one(first in any_fixture(), second in any_fixture()) {
        let store = Store::new();
        let (model, diagnostics) = compiled(&first);
        store.apply(model, diagnostics);
        let (model, diagnostics) = compiled(&second);
        let changes = store.apply(model.clone(), diagnostics.clone());
        let stored = store.model();
        prop_assert_eq!(&model.workloads, &stored.workloads);
        prop_assert_eq!(&model.by_ip, &stored.by_ip);
        prop_assert_eq!(&model.services, &stored.services);
        prop_assert_eq!(&model.by_vip, &stored.by_vip);
        prop_assert_eq!(&model.external, &stored.external);
        prop_assert_eq!(&model.refused_addresses, &stored.refused_addresses);
        prop_assert_eq!(diagnostics, stored.diagnostics());
        prop_assert!(store.apply(model, stored.diagnostics().to_vec()).is_empty());
        for uid in &changes.added {
            prop_assert!(stored.workload(uid).is_some());
        }
        check_arcs(&stored)?;
    }

    #[test]
    fn no_address_has_two_identities(fixture in any_fixture()) {
        let (model, _) = compiled(&fixture);
        for (ip, owner) in &model.by_ip {
            prop_assert!(owner.ips.contains(ip) && !owner.host_network);
            prop_assert!(model.address_refusal(*ip).is_none() && model.service_by_vip(*ip).is_none());
            let rivals = model.workloads().filter(|w| !w.host_network && w.ips.contains(ip));
            let rivals = rivals.filter(|w| w.uid != owner.uid);
            for rival in rivals {
                prop_assert!(rival.health.terminating && !owner.health.terminating);
            }
        }
        for service in model.services() {
            for endpoint in &service.endpoints {
                for ip in &endpoint.addresses {
                    let owner = model.workload_by_ip(*ip);
                    prop_assert_eq!(owner.is_some(), endpoint.workload().is_some_and(|w| !w.host_network));
                    prop_assert!(owner.is_none() || owner == endpoint.workload());
                    prop_assert!(model.address_refusal(*ip).is_none());
                }
            }
        }
    }

    #[test]
    fn route_never_violates_its_rules(
        fixture in any_fixture(), ip in 0..12u8, port in prop_oneof![Just(80u16), Just(8080), Just(81)],
        seed in any::<u64>(),
    ) {
        let client = pod("client", "10.0.1.1").ambient();
        let (model, _) = compiled(&[&fixture[..], &[client]].concat());
        let destination = SocketAddr::from(([10, 0, 0, ip], port));
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut tried = Vec::new();
        for _ in 0..12 {
            let decision = decide(&model, destination, &tried, &mut rng);
            check_route(&model, destination, &decision, &tried)?;
            match decision.endpoint() {
                Some(key) => tried.push(key),
                None => break,
            }
        }
        let last = decide(&model, destination, &tried, &mut rng);
        let ended = matches!(last, Route::NoEndpoint { .. } | Route::Passthrough { .. });
        prop_assert!(ended);
        prop_assert!(model.workloads().all(|w| w.load.active() == 0));
    }

    #[test]
    fn truncated_file_never_fails_as_a_whole(
        fixture in any_fixture(), cut in 0..4000usize,
    ) {
        let text = crate::testing::text(&fixture);
        let cut = text.floor_char_boundary(cut.min(text.len()));
        let parsed = parse(&"cut.yaml".into(), &text.as_bytes()[..cut]);
        let whole = objects(&fixture);
        prop_assert!(parsed.objects.len() <= whole.len());
        prop_assert!(parsed.errors.len() <= 1, "only the last document can be invalid");
    }
}

fn decide(model: &Model, to: SocketAddr, tried: &[EndpointKey], rng: &mut fastrand::Rng) -> Route {
    let client = model.workloads().find(|w| &*w.name == "client");
    route(
        model,
        client.expect("every fixture has the client"),
        to,
        tried,
        rng,
    )
}

fn check_route(
    model: &Model,
    destination: SocketAddr,
    decision: &Route,
    tried: &[EndpointKey],
) -> Result<(), TestCaseError> {
    let ip = destination.ip();
    if let Some(key) = decision.endpoint() {
        prop_assert!(!tried.contains(&key));
    }
    match decision {
        Route::Mesh {
            workload,
            target,
            tunnel,
            service,
            ..
        } => {
            prop_assert!(workload.is_meshed());
            prop_assert_eq!(tunnel.ip(), target.ip());
            prop_assert_eq!(model.workload_by_ip(target.ip()), Some(workload));
            check_service(model, ip, service.as_deref(), decision)?;
        }
        Route::Plain {
            workload,
            target,
            service,
            ..
        } => {
            prop_assert!(
                workload.as_ref().is_none_or(|w| !w.is_meshed()),
                "never in clear"
            );
            let owner = model.workload_by_ip(target.ip());
            prop_assert!(
                owner.is_none_or(|owner| !owner.is_meshed()),
                "by no other way either"
            );
            check_service(model, ip, service.as_deref(), decision)?;
        }
        Route::Passthrough { target } => {
            prop_assert_eq!(*target, destination);
            prop_assert!(model.workload_by_ip(ip).is_none());
            prop_assert!(model.service_by_vip(ip).is_none() && model.address_refusal(ip).is_none());
        }
        Route::NoEndpoint { code, .. } => {
            let refused = model.address_refusal(ip).map(AddressRefusal::code);
            prop_assert!(refused.is_none_or(|refused| refused == *code));
        }
    }
    Ok(())
}

fn check_service(
    model: &Model,
    ip: IpAddr,
    service: Option<&crate::Service>,
    decision: &Route,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(model.service_by_vip(ip).map(|s| &**s), service);
    let Some(service) = service else {
        return Ok(());
    };
    let key = decision
        .endpoint()
        .expect("mesh and plain have an endpoint");
    let chosen = service
        .endpoints
        .iter()
        .find(|e| e.key() == key)
        .expect("it is the service's");
    let health = chosen.health;
    prop_assert!(health.ready || (health.serving && health.terminating));
    prop_assert!(
        !service.node_local || &*chosen.node == "a",
        "the client's node"
    );
    Ok(())
}

/// Every lookup of an entry returns the same allocation.
fn check_arcs(model: &Model) -> Result<(), TestCaseError> {
    for workload in model.by_ip.values() {
        prop_assert!(Arc::ptr_eq(workload, &model.workloads[&workload.uid]));
    }
    let from_outside = model.external.by_address.values();
    let from_outside = from_outside.chain(model.external.by_node_port.values());
    for service in model.by_vip.values().chain(from_outside) {
        prop_assert!(Arc::ptr_eq(service, &model.services[&service.key()]));
    }
    for endpoint in model
        .services
        .values()
        .flat_map(|service| &service.endpoints)
    {
        if let Some(workload) = endpoint.workload() {
            prop_assert!(Arc::ptr_eq(workload, &model.workloads[&workload.uid]));
        }
    }
    Ok(())
}
