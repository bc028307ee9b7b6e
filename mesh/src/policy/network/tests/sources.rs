//! `from`: which sources a rule admits.

use super::Fixture;
use crate::testing::{namespace, pod};

/// A policy for `x/a` that admits these peers.
fn from(peers: &str) -> Fixture {
    Fixture::new(&[&policy(peers)])
}

fn policy(peers: &str) -> String {
    format!("spec: {{podSelector: {{matchLabels: {{pod: a}}}}, ingress: [{{from: {peers}}}]}}")
}

const POD_B: &str = "podSelector: {matchLabels: {pod: b}}";
const NS_Y: &str = "namespaceSelector: {matchLabels: {ns: y}}";

#[test]
fn pod_selector_matches_pods_of_the_policys_namespace() {
    from("[{podSelector: {}}]").expect("x/a", "x/*");
    from(&format!("[{{{POD_B}}}]")).expect("x/a", "x/b");
    from("[{podSelector: {matchLabels: {pod: none}}}]").expect("x/a", "");
}

#[test]
fn namespace_selector_matches_all_pods_of_those_namespaces() {
    from("[{namespaceSelector: {}}]").expect("x/a", "x/* y/* z/*");
    from(&format!("[{{{NS_Y}}}]")).expect("x/a", "y/*");
}

#[test]
fn selectors_of_one_peer_are_anded_and_peers_are_ored() {
    from(&format!("[{{{NS_Y}, {POD_B}}}]")).expect("x/a", "y/b");
    from(&format!("[{{{NS_Y}}}, {{{POD_B}}}]")).expect("x/a", "x/b y/*");
    from(&format!("[{{namespaceSelector: {{}}, {POD_B}}}]")).expect("x/a", "x/b y/b z/b");
    from(&format!("[{{{NS_Y}, podSelector: {{}}}}]")).expect("x/a", "y/*");
}

#[test]
fn namespace_selector_also_decides_for_the_own_namespace() {
    // With a namespaceSelector, the podSelector is not limited to the policy's namespace.
    from(&format!("[{{{NS_Y}, {POD_B}}}]")).expect("x/a", "y/b");
    from("[{namespaceSelector: {matchLabels: {ns: x}}}]").expect("x/a", "x/*");
}

#[test]
fn namespace_name_label_always_exists() {
    let by_name =
        "[{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: y}}}]".to_owned();
    from(&by_name).expect("x/a", "y/*");
    let lies = |docs: &mut Vec<_>| {
        let liar = namespace("z").label("kubernetes.io/metadata.name", "y");
        docs.retain(|doc: &crate::testing::Doc| doc.0["metadata"]["name"] != "z");
        docs.push(liar);
    };
    Fixture::changed(&[&policy(&by_name)], lies).expect("x/a", "y/*");
}

#[test]
fn namespace_without_an_object_matches_only_by_name() {
    let without_y = |peers: &str| {
        Fixture::changed(&[&policy(peers)], |docs| {
            docs.retain(|doc| doc.0["kind"] != "Namespace" || doc.0["metadata"]["name"] != "y");
        })
    };
    let expressions =
        |rest: &str| format!("[{{namespaceSelector: {{matchExpressions: [{{{rest}}}]}}}}]");
    let name = "key: kubernetes.io/metadata.name";
    without_y("[{namespaceSelector: {}}]").expect("x/a", "x/* y/* z/*");
    without_y(&expressions(&format!("{name}, operator: In, values: [y]"))).expect("x/a", "y/*");
    without_y(&expressions(&format!(
        "{name}, operator: NotIn, values: [z]"
    )))
    .expect("x/a", "x/* y/*");
    without_y(&expressions("key: ns, operator: NotIn, values: [z]")).expect("x/a", "x/*");
    without_y(&expressions("key: secret, operator: DoesNotExist")).expect("x/a", "x/* z/*");
}

#[test]
fn current_labels_are_matched() {
    let relabelled = |namespace: &str, pod: &str| {
        let (namespace, pod) = (namespace.to_owned(), pod.to_owned());
        Fixture::changed(&[&policy(&format!("[{{{NS_Y}, {POD_B}}}]"))], move |docs| {
            for doc in docs {
                if doc.0["metadata"]["namespace"] == "z" && doc.0["metadata"]["name"] == "c" {
                    doc.0["metadata"]["labels"]["pod"] = pod.clone().into();
                }
                if doc.0["kind"] == "Namespace" && doc.0["metadata"]["name"] == "z" {
                    doc.0["metadata"]["labels"]["ns"] = namespace.clone().into();
                }
            }
        })
    };
    relabelled("z", "b").expect("x/a", "y/b");
    relabelled("y", "c").expect("x/a", "y/b z/b");
    relabelled("y", "b").expect("x/a", "y/b z/b z/c");
}

#[test]
fn ip_block_admits_its_addresses_without_the_exceptions() {
    let fixture = from("[{ipBlock: {cidr: 10.0.0.0/16, except: [10.0.2.0/24, 10.0.3.2/32]}}]");
    fixture.expect("x/a", "x/* z/a z/c");
    assert!(fixture.admits("10.0.200.1", "x/a", 80));
    assert!(!fixture.admits("10.1.0.1", "x/a", 80));
    assert!(!fixture.admits("fd00::1:2", "x/a", 80));
}

#[test]
fn ip_blocks_work_in_both_families() {
    let fixture = from("[{ipBlock: {cidr: 'fd00::/16', except: ['fd00::2:0/112']}}]");
    let table = [
        ("fd00::1:2", true),
        ("fd00::2:2", false),
        ("fd00::3:1", true),
        ("fd01::1", false),
        ("10.0.1.2", false),
        ("203.0.113.9", false),
    ];
    for (from, admitted) in table {
        assert_eq!(fixture.admits(from, "x/a", 80), admitted, "{from}");
    }
}

#[test]
fn ipv4_mapped_address_matches_as_ipv4() {
    let fixture = from("[{ipBlock: {cidr: 203.0.113.0/24}}]");
    assert!(fixture.admits("::ffff:203.0.113.9", "x/a", 80));
    assert!(!fixture.admits("::ffff:203.0.114.9", "x/a", 80));
    assert!(!from("[{ipBlock: {cidr: '::/0'}}]").admits("::ffff:203.0.113.9", "x/a", 80));
}

#[test]
fn overlapping_ip_blocks_add_up() {
    // The exception of one peer does not affect another peer.
    let fixture = from(
        "[{ipBlock: {cidr: 10.0.2.0/24, except: [10.0.2.2/32]}}, {ipBlock: {cidr: 10.0.2.2/32}}]",
    );
    fixture.expect("x/a", "y/*");
}

#[test]
fn source_without_a_pod_is_matched_by_ip_block_only() {
    let outside = "203.0.113.9";
    assert!(!from("[{namespaceSelector: {}}]").admits(outside, "x/a", 80));
    assert!(!from("[{podSelector: {}}]").admits(outside, "x/a", 80));
    assert!(from("[{ipBlock: {cidr: 203.0.113.0/24}}]").admits(outside, "x/a", 80));
    assert!(from("[]").admits(outside, "x/a", 80));
}

#[test]
fn host_network_pod_is_matched_as_its_node() {
    let host = |peers: &str| {
        Fixture::changed(&[&policy(peers)], |docs| {
            let pod = pod("agent", "192.168.0.1")
                .set("metadata.namespace", "x")
                .set("spec.hostNetwork", true);
            docs.push(pod);
        })
    };
    assert!(!host("[{namespaceSelector: {}}]").admits("192.168.0.1", "x/a", 80));
    // Not even if the caller passes the pod as the source workload.
    assert!(!host("[{namespaceSelector: {}}]").admits("x/agent", "x/a", 80));
    assert!(!host("[{podSelector: {}}]").admits("x/agent", "x/a", 80));
    assert!(host("[{ipBlock: {cidr: 192.168.0.0/24}}]").admits("192.168.0.1", "x/a", 80));
    assert!(host("[{ipBlock: {cidr: 192.168.0.0/24}}]").admits("x/agent", "x/a", 80));
}

#[test]
fn address_claimed_by_two_pods_is_matched_as_no_pod() {
    let fixture = Fixture::changed(&[&policy("[{namespaceSelector: {}}]")], |docs| {
        let twin = pod("twin", "10.0.2.2").set("metadata.namespace", "y");
        docs.push(twin);
    });
    assert!(!fixture.admits("10.0.2.2", "x/a", 80));
    assert!(fixture.admits("10.0.2.1", "x/a", 80));
}
