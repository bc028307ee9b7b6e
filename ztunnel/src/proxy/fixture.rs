//! Two pods and a policy, for unit tests.

use std::rc::Rc;

use mesh::objects::{Objects, parse};
use mesh::{Params, Store, WorkloadUid, compile};
use spiffe::TrustDomain;

use super::PodContext;

/// Two pods, `web` at 10.0.0.1 and `cart` at 10.0.0.2, labelled by their names.
pub(crate) const PODS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, uid: u-web, labels: {app: web}}
spec: {serviceAccountName: web, containers: [{name: app, image: app}]}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, uid: u-cart, labels: {app: cart}}
spec: {serviceAccountName: cart, containers: [{name: app, image: app}]}
status: {phase: Running, podIP: 10.0.0.2, podIPs: [{ip: 10.0.0.2}]}
";

/// Denies port 9090 of every pod of the namespace to all sources.
pub(crate) const DENY_9090: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: deny-9090, namespace: shop}
spec: {action: DENY, rules: [{to: [{operation: {ports: ['9090']}}]}]}
";

/// Replaces the model with the two pods and these objects.
pub(crate) fn publish(store: &Store, more: &[&str]) {
    publish_with(store, PODS, more);
}

/// Replaces the model with these pods and objects.
pub(crate) fn publish_with(store: &Store, pods: &str, more: &[&str]) {
    let yaml = [&[pods], more].concat().join("---\n");
    let mut objects = Objects::default();
    let parsed = parse(&"fixture.yaml".into(), yaml.as_bytes());
    assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
    for (object, origin) in parsed.objects {
        objects.insert(object, origin);
    }
    let params = Params::new("cluster.local".parse().unwrap());
    let (model, problems) = compile(&objects, &params);
    store.apply(model, problems);
}

/// A store with the two pods, and `cart` as a pod of this node.
pub(crate) fn cart() -> (Store, Rc<PodContext>) {
    cart_with_aliases(vec![])
}

/// The same, in a mesh whose trust domain has these aliases.
pub(crate) fn cart_with_aliases(aliases: Vec<TrustDomain>) -> (Store, Rc<PodContext>) {
    let store = Store::new();
    publish(&store, &[]);
    let uid = WorkloadUid::of_pod("Kubernetes", "shop", "cart", "u-cart");
    let pod = PodContext::with_store_and_aliases(uid, store.clone(), aliases);
    (store, Rc::new(pod))
}
