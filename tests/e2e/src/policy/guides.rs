//! Example policies of published guides, and which connections each of them allows.
//!
//! Their text is in the folder `guides`, adapted to the [fixture](super::fixture): names and
//! addresses are the guides' own where the fixture has them.

use std::collections::BTreeMap;

use anyhow::Result;
use lab::Lab;

use super::connection::{check_connections, connections};
use super::fixture::{BAR, CLIENTS, FOO, HTTP, LEGACY, PRODUCTPAGE, TCP};
use super::telemetry::{Baseline, Denial};
use crate::input::SourceFile;
use crate::sync::wait_synced;

/// The policy of a denial by a workload that has ALLOW policies, none of which matched.
pub const NO_ALLOW: &str = "AuthorizationPolicy: no ALLOW matched";

const BOTH: &[u16] = &[HTTP, TCP];
const MESHED: &[(&str, &[u16])] = &[(PRODUCTPAGE, BOTH), (FOO, BOTH), (BAR, BOTH)];
const ALL: &[(&str, &[u16])] = &[
    (PRODUCTPAGE, BOTH),
    (FOO, BOTH),
    (BAR, BOTH),
    (LEGACY, BOTH),
];
const ALL_HTTP: &[(&str, &[u16])] = &[
    (PRODUCTPAGE, &[HTTP]),
    (FOO, &[HTTP]),
    (BAR, &[HTTP]),
    (LEGACY, &[HTTP]),
];
const ALL_TCP: &[(&str, &[u16])] = &[
    (PRODUCTPAGE, &[TCP]),
    (FOO, &[TCP]),
    (BAR, &[TCP]),
    (LEGACY, &[TCP]),
];
/// Clients on node `a`, whose pods have addresses in 10.244.1.0/24.
const NODE_A: &[(&str, &[u16])] = &[(PRODUCTPAGE, BOTH), (FOO, BOTH), (LEGACY, BOTH)];

/// One example policy.
#[derive(Debug, Clone, Copy)]
pub struct Guide {
    /// The name of the file, without `.yaml`.
    pub name: &'static str,
    /// The content of the file.
    pub yaml: &'static str,
    /// Allowed clients, each with the allowed ports. All other connections are denied.
    pub allows: &'static [(&'static str, &'static [u16])],
    /// The policy that a denial names on [`HTTP`] and on [`TCP`].
    pub denied_by: [&'static str; 2],
}

macro_rules! guides {
    ($($name:literal: $allows:expr, $http:expr, $tcp:expr;)*) => {
        &[$(Guide {
            name: $name,
            yaml: include_str!(concat!("guides/", $name, ".yaml")),
            allows: $allows,
            denied_by: [$http, $tcp],
        }),*]
    };
}

/// AuthorizationPolicy.
pub const AUTHORIZATION: &[Guide] = guides! {
    "allow-nothing": &[], NO_ALLOW, NO_ALLOW;
    "deny-all-mesh-wide": &[], NO_ALLOW, NO_ALLOW;
    "allow-all": ALL, "", "";
    "deny-all": &[], "AuthorizationPolicy foo/deny-all", "AuthorizationPolicy foo/deny-all";
    "principal": &[(PRODUCTPAGE, BOTH)], NO_ALLOW, NO_ALLOW;
    "principals-by-suffix": &[(FOO, BOTH), (BAR, BOTH)], NO_ALLOW, NO_ALLOW;
    "any-principal": MESHED, NO_ALLOW, NO_ALLOW;
    "not-principals": &[(FOO, BOTH)],
        "AuthorizationPolicy foo/only-curl-of-foo", "AuthorizationPolicy foo/only-curl-of-foo";
    "service-accounts": &[(PRODUCTPAGE, BOTH), (FOO, BOTH)], NO_ALLOW, NO_ALLOW;
    "namespace-isolation": &[(FOO, BOTH)], NO_ALLOW, NO_ALLOW;
    "namespace-isolation-by-deny": &[(FOO, BOTH)],
        "AuthorizationPolicy foo/foo-isolation", "AuthorizationPolicy foo/foo-isolation";
    "deny-by-port": ALL_HTTP, "", "AuthorizationPolicy foo/tcp-policy";
    "allow-by-port": ALL_TCP, NO_ALLOW, "";
    // An attribute of HTTP never matches in an ALLOW, and is ignored in a DENY.
    "allow-by-port-and-method": &[], NO_ALLOW, NO_ALLOW;
    "deny-by-port-and-method": ALL_HTTP, "", "AuthorizationPolicy foo/tcp-policy";
    "ip-blocks": NODE_A, NO_ALLOW, NO_ALLOW;
    "not-ip-blocks": NODE_A,
        "AuthorizationPolicy foo/ingress-policy", "AuthorizationPolicy foo/ingress-policy";
    "when-source-namespace": &[(PRODUCTPAGE, BOTH), (FOO, BOTH)], NO_ALLOW, NO_ALLOW;
    "when-source-principal-and-port":
        &[(PRODUCTPAGE, &[HTTP]), (FOO, &[HTTP]), (LEGACY, &[HTTP])], NO_ALLOW, NO_ALLOW;
    "when-source-ip": NODE_A,
        "AuthorizationPolicy foo/when-source-ip", "AuthorizationPolicy foo/when-source-ip";
    "allow-and-deny": &[(FOO, &[HTTP])], NO_ALLOW, "AuthorizationPolicy foo/deny-9000";
    "from-and-to": &[(PRODUCTPAGE, &[HTTP]), (BAR, &[HTTP]), (FOO, BOTH)], NO_ALLOW, NO_ALLOW;
    "other-namespace": ALL, "", "";
};

/// PeerAuthentication.
pub const AUTHENTICATION: &[Guide] = guides! {
    "mesh-strict": MESHED,
        "PeerAuthentication istio-system/default", "PeerAuthentication istio-system/default";
    "namespace-strict": MESHED, "PeerAuthentication foo/default", "PeerAuthentication foo/default";
    "workload-strict": MESHED, "PeerAuthentication foo/httpbin", "PeerAuthentication foo/httpbin";
    "mesh-strict-workload-permissive": ALL, "", "";
    "strict-port-permissive":
        &[(PRODUCTPAGE, BOTH), (FOO, BOTH), (BAR, BOTH), (LEGACY, &[TCP])],
        "PeerAuthentication foo/default", "";
    "permissive-port-strict":
        &[(PRODUCTPAGE, BOTH), (FOO, BOTH), (BAR, BOTH), (LEGACY, &[HTTP])],
        "", "PeerAuthentication foo/default";
    "mesh-strict-port-disable":
        &[(PRODUCTPAGE, BOTH), (FOO, BOTH), (BAR, BOTH), (LEGACY, &[TCP])],
        "PeerAuthentication istio-system/default", "";
    "mesh-strict-namespace-disable": ALL, "", "";
};

/// NetworkPolicy.
pub const NETWORK: &[Guide] = guides! {
    "default-deny-ingress": &[],
        "NetworkPolicy: no ingress rule matched (foo/default-deny-ingress)",
        "NetworkPolicy: no ingress rule matched (foo/default-deny-ingress)";
    "web-deny-all": &[],
        "NetworkPolicy: no ingress rule matched (foo/web-deny-all)",
        "NetworkPolicy: no ingress rule matched (foo/web-deny-all)";
    "allow-from-same-namespace": &[(FOO, BOTH)],
        "NetworkPolicy: no ingress rule matched (foo/deny-from-other-namespaces)",
        "NetworkPolicy: no ingress rule matched (foo/deny-from-other-namespaces)";
    "allow-from-namespace": &[(BAR, BOTH)],
        "NetworkPolicy: no ingress rule matched (foo/web-allow-prod)",
        "NetworkPolicy: no ingress rule matched (foo/web-allow-prod)";
    "allow-from-named-namespaces": &[(PRODUCTPAGE, BOTH), (LEGACY, BOTH)],
        "NetworkPolicy: no ingress rule matched (foo/from-named-namespaces)",
        "NetworkPolicy: no ingress rule matched (foo/from-named-namespaces)";
    "allow-monitoring": &[(BAR, BOTH)],
        "NetworkPolicy: no ingress rule matched (foo/web-allow-all-ns-monitoring)",
        "NetworkPolicy: no ingress rule matched (foo/web-allow-all-ns-monitoring)";
    "allow-named-port": ALL_HTTP, "",
        "NetworkPolicy: no ingress rule matched (foo/api-allow-http)";
    "allow-port-range": &[(FOO, &[TCP])],
        "NetworkPolicy: no ingress rule matched (foo/multi-port)",
        "NetworkPolicy: no ingress rule matched (foo/multi-port)";
    "ip-block-except": &[(PRODUCTPAGE, &[HTTP]), (FOO, &[HTTP]), (LEGACY, &[HTTP])],
        "NetworkPolicy: no ingress rule matched (foo/test-network-policy)",
        "NetworkPolicy: no ingress rule matched (foo/test-network-policy)";
    "default-deny-and-allow": &[(PRODUCTPAGE, &[TCP])],
        "NetworkPolicy: no ingress rule matched (foo/default-deny-ingress, foo/allow-productpage)",
        "NetworkPolicy: no ingress rule matched (foo/default-deny-ingress, foo/allow-productpage)";
    "deny-egress": ALL, "", "";
};

impl Guide {
    /// Applies the policy, opens every connection of the fixture and removes the policy again.
    /// Outcomes, access log and metric must agree with [`Self::allows`] and [`Self::denied_by`].
    ///
    /// # Errors
    /// They do not; the error lists every connection with another outcome.
    pub fn check(&self, lab: &Lab) -> Result<()> {
        let file = SourceFile::write(lab, &format!("{}.yaml", self.name), self.yaml)?;
        wait_synced(lab)?;
        let baseline = Baseline::take(lab)?;
        check_connections(lab, &CLIENTS, |client, port| {
            self.denying_policy(client, port).is_none()
        })?;
        baseline.wait_denials(lab, &self.denials())?;
        drop(file);
        Ok(())
    }

    /// The policy that denies this client's connections to a port; `None` if they are allowed.
    fn denying_policy(&self, client: &str, port: u16) -> Option<&'static str> {
        let is_allowed = self
            .allows
            .iter()
            .any(|(from, ports)| *from == client && ports.contains(&port));
        (!is_allowed).then_some(self.denied_by[usize::from(port == TCP)])
    }

    fn denials(&self) -> BTreeMap<Denial, usize> {
        let mut denials = BTreeMap::new();
        for connection in CLIENTS.into_iter().flat_map(connections) {
            let Some(policy) = self.denying_policy(connection.from, connection.port) else {
                continue;
            };
            let (from, to) = (connection.from.to_owned(), connection.to.to_owned());
            let denial = (from, to, connection.port, policy.to_owned());
            *denials.entry(denial).or_insert(0) += 1;
        }
        denials
    }
}
