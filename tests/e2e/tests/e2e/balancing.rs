//! Which endpoint of a service a connection is sent to.

use std::collections::BTreeMap;
use std::time::Duration;

use ambit_e2e::manifest::{Pod, Service};
use ambit_e2e::open_connections::OpenConnections;
use ambit_e2e::programs::{self, PORT, curl, curl_many, greeter, url};
use ambit_e2e::web_service::{client, count_answers, endpoint, greeting_endpoint, lab_with};
use ambit_e2e::{metrics, sync};
use lab::{IpFamily, Location};
use serde_json::json;

#[test]
fn unready_endpoint_is_used_only_by_a_service_that_publishes_it() {
    let service = Service::new("in", "web", 80, PORT);
    let publishing = Service::new("in", "publishing", 80, PORT)
        .selecting("web")
        .spec("publishNotReadyAddresses", true);
    let lab = lab_with([
        service.into(),
        publishing.into(),
        endpoint("in", "ready", "b").into(),
    ])
    .unwrap();
    let probe = json!({"exec": {"command": ["false"]}, "periodSeconds": 1});
    let unready = endpoint("in", "unready", "b").container("readinessProbe", probe);
    lab.apply(String::from(unready)).unwrap();
    lab.wait_status("the pod to run", Duration::from_secs(10), |status| {
        status
            .pod("in/unready")
            .is_ok_and(|pod| pod.phase == "Running")
    })
    .unwrap();
    // Once the publishing service uses the endpoint, the daemon has read it, and the other service must
    // not use it.
    let to = |service: &str| url(lab.service_ip(service, IpFamily::V4).unwrap(), 80);
    lab.wait_until(
        "the published address to be used",
        Duration::from_secs(10),
        || (curl(&lab, &client(), &to("publishing"), &[]).ok()?.body == "unready").then_some(()),
    )
    .unwrap();
    let responses = curl_many(&lab, &client(), &to("web"), 30).unwrap();
    assert_eq!(count_answers(&responses), BTreeMap::from([("ready", 30)]));
}

#[test]
fn terminating_endpoint_keeps_open_connections_and_gets_new_ones_only_as_the_last() {
    let service = Service::new("in", "web", PORT, PORT);
    let terminating = greeting_endpoint("in", "terminating", "b")
        .runs(programs::ignoring_sigterm(greeter(PORT, "terminating")));
    let terminating = terminating.spec("terminationGracePeriodSeconds", 30);
    let lab = lab_with([
        service.into(),
        terminating.into(),
        greeting_endpoint("in", "running", "b").into(),
    ])
    .unwrap();
    let ip = lab.service_ip("web", IpFamily::V4).unwrap();
    let mut before = OpenConnections::open(&lab, "in/client", ip, 12).unwrap();
    assert_eq!(count_answers(&before.greetings).len(), 2, "{before:?}");
    std::thread::scope(|scope| {
        let deletion = scope.spawn(|| lab.delete("Pod", "in/terminating"));
        lab.wait_status("the pod to terminate", Duration::from_secs(5), |status| {
            status
                .pod("in/terminating")
                .is_ok_and(|pod| pod.phase == "Terminating")
        })
        .unwrap();
        sync::wait_synced(&lab).unwrap();
        let new = OpenConnections::open(&lab, "in/client", ip, 20).unwrap();
        assert_eq!(
            count_answers(&new.greetings),
            BTreeMap::from([("running", 20)])
        );
        before.echo(&lab, "still open").unwrap();
        // As in kube-proxy, terminating endpoints are used if there are no others.
        lab.delete_pod_with_grace("in/running", Duration::ZERO)
            .unwrap();
        sync::wait_synced(&lab).unwrap();
        let last = OpenConnections::open(&lab, "in/client", ip, 3).unwrap();
        assert_eq!(
            count_answers(&last.greetings),
            BTreeMap::from([("terminating", 3)])
        );
        lab.delete_pod_with_grace("in/terminating", Duration::ZERO)
            .unwrap();
        deletion.join().unwrap().unwrap();
    });
}

#[test]
fn client_ip_affinity_survives_a_daemon_restart() {
    let service = Service::new("in", "web", 80, PORT).spec("sessionAffinity", "ClientIP");
    let servers =
        ["w1", "w2", "w3", "w4", "w5"].map(|name| String::from(endpoint("in", name, "b")));
    let other = String::from(Pod::new("in", "other").on("a"));
    let lab = lab_with(servers.into_iter().chain([other, service.into()])).unwrap();
    let chosen_endpoints = || -> Vec<String> {
        let mut chosen = Vec::new();
        for pod in ["in/client", "in/other"] {
            for family in IpFamily::ALL {
                let to = url(lab.service_ip("web", family).unwrap(), 80);
                let responses = curl_many(&lab, &Location::pod(pod), &to, 8).unwrap();
                assert_eq!(
                    count_answers(&responses).len(),
                    1,
                    "{pod} {family:?}: {responses:?}"
                );
                chosen.push(responses[0].clone());
            }
        }
        chosen
    };
    let before = chosen_endpoints();
    lab.stop_daemon("a").unwrap();
    lab.start_daemon("a").unwrap();
    for pod in ["in/client", "in/other"] {
        lab.wait_workload_state(pod, Some("enrolled"), Duration::from_secs(10))
            .unwrap();
    }
    assert_eq!(chosen_endpoints(), before);
}

#[test]
fn prefer_close_uses_the_own_zone_while_it_has_an_endpoint() {
    let service = Service::new("in", "web", 80, PORT).spec("trafficDistribution", "PreferClose");
    let lab = lab_with([
        endpoint("in", "near", "a").into(),
        endpoint("in", "far", "b").into(),
        service.into(),
    ])
    .unwrap();
    for family in IpFamily::ALL {
        let to = url(lab.service_ip("web", family).unwrap(), 80);
        let responses = curl_many(&lab, &client(), &to, 20).unwrap();
        assert_eq!(count_answers(&responses), BTreeMap::from([("near", 20)]));
    }
    lab.delete("Pod", "in/near").unwrap();
    sync::wait_synced(&lab).unwrap();
    let to = url(lab.service_ip("web", IpFamily::V4).unwrap(), 80);
    let responses = curl_many(&lab, &client(), &to, 5).unwrap();
    assert_eq!(count_answers(&responses), BTreeMap::from([("far", 5)]));
}

#[test]
fn open_connections_are_balanced_over_equal_endpoints() {
    let service = String::from(Service::new("in", "web", PORT, PORT));
    let servers = [("w1", "a"), ("w2", "b"), ("w3", "b")]
        .map(|(name, node)| greeting_endpoint("in", name, node).into());
    let lab = lab_with(servers.into_iter().chain([service])).unwrap();
    let ip = lab.service_ip("web", IpFamily::V4).unwrap();
    let connections = OpenConnections::open(&lab, "in/client", ip, 30).unwrap();
    // Power of two choices by open connections: no endpoint gets fewer than 7 of 30 in practice. A
    // random choice would be as uneven as 5 to 15 in 1 of 20 runs.
    let counts = count_answers(&connections.greetings);
    assert_eq!(counts.len(), 3, "{counts:?}");
    assert!(
        counts.values().all(|count| (7..=13).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn refused_connections_are_retried_on_another_endpoint() {
    let mut all = Vec::new();
    for namespace in ["in", "out"] {
        // The pod is ready because it has no probe, but no program listens.
        let refusing = Pod::new(namespace, "refusing")
            .on("b")
            .label("app", "web")
            .port(Some("web"), PORT);
        all.push(refusing.into());
        all.push(endpoint(namespace, "serving", "b").into());
        all.push(Service::new(namespace, "web", 80, PORT).into());
    }
    let lab = lab_with(all).unwrap();
    for namespace in ["in", "out"] {
        for family in IpFamily::ALL {
            let to = url(
                lab.service_ip(&format!("{namespace}/web"), family).unwrap(),
                80,
            );
            let responses = curl_many(&lab, &client(), &to, 20).unwrap();
            assert_eq!(
                count_answers(&responses),
                BTreeMap::from([("serving", 20)]),
                "{namespace} {family:?}"
            );
        }
    }
}

#[test]
fn connections_to_a_node_with_a_killed_daemon_are_retried_on_another() {
    let service = Service::new("in", "web", 80, PORT);
    let servers = [
        endpoint("in", "near", "a").into(),
        endpoint("in", "far", "b").into(),
    ];
    let lab = lab_with(servers.into_iter().chain([service.into()])).unwrap();
    let to = |family| url(lab.service_ip("web", family).unwrap(), 80);
    // Opens tunnels to both endpoints. The one to node b breaks with the daemon.
    let responses = curl_many(&lab, &client(), &to(IpFamily::V4), 20).unwrap();
    assert_eq!(count_answers(&responses).len(), 2);
    lab.kill_daemon("b").unwrap();
    for family in IpFamily::ALL {
        let responses = curl_many(&lab, &client(), &to(family), 20).unwrap();
        assert_eq!(count_answers(&responses), BTreeMap::from([("near", 20)]));
    }
    let labels = [("reporter", "source"), ("destination_workload", "far")];
    let failed_total = "istio_tcp_connections_failed_total";
    let failed = metrics::sum(&metrics::scrape(&lab, "a").unwrap(), failed_total, &labels);
    assert!(
        failed < 0.5,
        "{failed} retried connections are counted as failed"
    );
}
