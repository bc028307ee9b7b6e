//! Whether a connection may reach its pod: asked when it begins, and again whenever the model has
//! changed.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh::{Attempt, Denial, Model, Workload};
use spiffe::{SpiffeId, TrustDomain};

use super::pod::PodContext;
use super::registry::{Connection, Request};

impl PodContext {
    /// Decides about what a connection asks for, by one model: `workload` is the pod in this model,
    /// and the source is who has the address in this model. A policy on trial is counted and logged,
    /// and denies nothing.
    pub(crate) fn authorize(
        &self,
        model: &Model,
        workload: &Workload,
        connection: &Connection,
        request: &Request,
    ) -> Result<(), Denial> {
        let Request {
            identity,
            destination,
        } = request;
        let source = connection.source.ip();
        let decision = model.authorize(
            workload,
            &Attempt {
                source: identity.as_deref(),
                source_ip: source,
                source_workload: self
                    .source(model, source, identity.as_deref())
                    .map(AsRef::as_ref),
                destination: *destination,
            },
        );
        if let Some(Denial { policy }) = decision.dry_run
            && connection.first_tried_by(&policy)
        {
            self.would_deny(connection.source, request, &policy);
        }
        decision.denial.map_or(Ok(()), Err)
    }

    /// The workload that has an address, unless whoever speaks from there proved to be another: it
    /// proved its identity and nothing else, so a workload of another identity says nothing about
    /// it.
    pub(crate) fn source<'a>(
        &self,
        model: &'a Model,
        address: IpAddr,
        proven: Option<&SpiffeId>,
    ) -> Option<&'a Arc<Workload>> {
        let workload = model.workload_by_ip(address)?;
        let is_itself = proven.is_none_or(|proven| {
            let known = &workload.identity;
            proven.path() == known.path() && self.is_one_mesh(known, proven.trust_domain())
        });
        is_itself.then_some(workload)
    }

    /// Whether a trust domain is that of this pod's identity, under this or another of its names. A
    /// root may sign for several trust domains; the identities of another mean nothing in this one.
    pub(crate) fn is_one_mesh(&self, pod: &SpiffeId, theirs: &TrustDomain) -> bool {
        pod.trust_domain() == theirs || self.trust_domain_aliases.contains(theirs)
    }

    /// The identity under every name of the trust domain, its own first. While a mesh changes its
    /// name, some nodes have done so and others have not.
    pub(crate) fn under_all_names(&self, identity: &SpiffeId) -> Vec<SpiffeId> {
        let aliases = self.trust_domain_aliases.iter();
        let renamed = aliases
            .filter_map(|name| SpiffeId::new(format!("spiffe://{name}{}", identity.path())).ok());
        std::iter::once(identity.clone()).chain(renamed).collect()
    }

    fn would_deny(&self, source: SocketAddr, request: &Request, policy: &Arc<str>) {
        self.telemetry.would_be_denied(policy);
        tracing::event!(
            target: "access",
            tracing::Level::INFO,
            src.addr = %source,
            src.identity = request.identity.as_deref().map(tracing::field::display),
            dst.addr = %request.destination,
            pod = %self.uid,
            direction = "inbound",
            policy = &**policy,
            "connection would be denied, were the policy not on trial"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::recheck::tests::cart;

    fn id(text: &str) -> SpiffeId {
        SpiffeId::new(text).unwrap()
    }

    #[tokio::test]
    async fn whoever_has_an_address_is_its_pod_unless_it_proved_to_be_another() {
        let (store, pod) = cart();
        let model = store.load();
        let address = "10.0.0.1".parse().unwrap();
        let known = |proven: Option<&str>| {
            let proven = proven.map(id);
            let source = pod.source(&model, address, proven.as_ref());
            source.map(|workload| workload.name.to_string())
        };
        assert_eq!(known(None).as_deref(), Some("web"));
        let web = "spiffe://cluster.local/ns/shop/sa/web";
        assert_eq!(known(Some(web)).as_deref(), Some("web"));
        assert_eq!(known(Some("spiffe://cluster.local/ns/shop/sa/cart")), None);
        assert_eq!(known(Some("spiffe://old.example/ns/shop/sa/web")), None);
        let nobody = "10.0.0.9".parse().unwrap();
        assert!(pod.source(&model, nobody, None).is_none());
    }

    #[tokio::test]
    async fn an_alias_of_the_trust_domain_is_another_name_of_the_same_identity() {
        let (store, pod) = cart();
        let mut pod = std::rc::Rc::into_inner(pod).unwrap();
        pod.trust_domain_aliases = Arc::new(["old.example".parse().unwrap()]);
        let old = id("spiffe://old.example/ns/shop/sa/web");
        let web = id("spiffe://cluster.local/ns/shop/sa/web");
        assert!(pod.is_one_mesh(&web, old.trust_domain()));
        let model = store.load();
        assert!(
            pod.source(&model, "10.0.0.1".parse().unwrap(), Some(&old))
                .is_some()
        );
        assert_eq!(pod.under_all_names(&web), [web, old]);
    }
}
