use super::*;

#[test]
fn serial_number_of_any_length_is_decimal() {
    assert_eq!(decimal("0"), "0");
    assert_eq!(decimal("ff"), "255");
    assert_eq!(
        decimal("ffffffffffffffffffffffffffffffff"),
        "340282366920938463463374607431768211455"
    );
    assert_eq!(decimal("01:00"), "256");
    assert_eq!(decimal("serial"), "");
}

#[test]
fn times_are_rfc_3339() {
    let time = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_767_323_045);
    assert_eq!(rfc3339(time), "2026-01-02T03:04:05Z");
}

#[test]
fn identity_without_a_certificate_is_initializing() {
    let status = IdentityStatus {
        identity: spiffe::SpiffeId::new("spiffe://cluster.local/ns/shop/sa/web").unwrap(),
        state: IdentityState::Initializing,
        certificate: None,
        last_error: None,
    };
    assert_eq!(
        identity_json(&status, &[]),
        json!({
            "identity": "spiffe://cluster.local/ns/shop/sa/web",
            "state": "Initializing",
            "certChain": [],
            "rootCerts": [],
        })
    );
}

#[test]
fn expired_identity_has_its_expiry_time_and_last_error() {
    let web = spiffe::SpiffeId::new("spiffe://cluster.local/ns/shop/sa/web").unwrap();
    let error = mesh::certs::IssueError::new(&web, "ca_unreachable", "connection refused");
    let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_767_323_045);
    let status = IdentityStatus {
        identity: web,
        state: IdentityState::Expired { at },
        certificate: None,
        last_error: Some(error),
    };
    let value = identity_json(&status, &[]);
    assert_eq!(
        value["state"],
        "Unavailable: certificate_expired at 2026-01-02T03:04:05Z: ca_unreachable: connection refused"
    );
    assert_eq!(
        value["lastError"],
        json!({ "code": "ca_unreachable", "message": "connection refused" })
    );
}

#[test]
fn pod_has_its_state_and_its_connections_by_direction() {
    let state = WorkloadState {
        uid: mesh::WorkloadUid::of_pod("Kubernetes", "shop", "web-0", "1234"),
        state: "pending",
        reason: Some("no netns".into()),
        since: SystemTime::UNIX_EPOCH,
        name: "web-0".into(),
        namespace: "shop".into(),
        service_account: "web".into(),
        trust_domain: "cluster.local".into(),
    };
    let connection = ConnectionInfo {
        direction: Direction::Outbound,
        source: "10.0.0.1:40000".parse().unwrap(),
        original_destination: "10.96.0.1:80".parse().unwrap(),
        actual_destination: Some("10.0.0.2:15008".parse().unwrap()),
        hbone: true,
        sent: 1,
        received: 2,
    };
    assert_eq!(
        workload_state_json(&state, &[connection]),
        json!({
            "state": "pending",
            "reason": "no netns",
            "since": "1970-01-01T00:00:00Z",
            "connections": {
                "inbound": [],
                "outbound": [{
                    "src": "10.0.0.1:40000",
                    "originalDst": "10.96.0.1:80",
                    "actualDst": "10.0.0.2:15008",
                    "protocol": "HBONE",
                    "bytesSent": 1,
                    "bytesReceived": 2,
                }],
            },
            "info": {
                "name": "web-0",
                "namespace": "shop",
                "trustDomain": "cluster.local",
                "serviceAccount": "web",
            },
        })
    );
}

#[test]
fn policy_has_the_fields_of_istioctl_and_its_state() {
    use crate::proxy::fixture::{DENY_9090, publish};
    let store = mesh::Store::new();
    publish(&store, &[DENY_9090]);
    let policies = json!(store.load().policies());
    let policy = &policies[0];
    for (key, value) in [
        ("name", json!("deny-9090")),
        ("namespace", json!("shop")),
        ("scope", json!("Namespace")),
        ("action", json!("Deny")),
        ("rules", json!([[[{ "destinationPorts": [9090] }]]])),
        ("state", json!("accepted")),
        ("dryRun", json!(false)),
    ] {
        assert_eq!(policy[key], value, "{key} of {policy}");
    }
    assert_eq!(policy["selects"].as_array().map(Vec::len), Some(2));
}
