//! Whether an inbound connection may reach its pod: evaluated before the first dial, and again by
//! [`super::reauthorize`] whenever the model changes.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use mesh::{Denial, InboundConnection, Model, Workload};
use spiffe::{SpiffeId, TrustDomain};

use super::connections::{AuthzRequest, Connection};
use super::context::PodContext;

impl PodContext {
    /// Evaluates the policies of `workload`, which is this pod in `model`. The source workload is
    /// the one that has the source address in the same model. A dry-run policy is counted and
    /// logged, and denies nothing.
    pub(super) fn authorize(
        &self,
        model: &Model,
        workload: &Workload,
        connection: &Connection,
        request: &AuthzRequest,
    ) -> Result<(), Denial> {
        let AuthzRequest {
            identity,
            destination,
        } = request;
        let source = connection.source.ip();
        let decision = model.authorize(
            workload,
            &InboundConnection {
                source_identity: identity.as_deref(),
                source_ip: source,
                source_workload: self
                    .source_workload(model, source, identity.as_deref())
                    .map(AsRef::as_ref),
                destination: *destination,
            },
        );
        if let Some(Denial { policy }) = decision.dry_run
            && connection.record_dry_run_denial(&policy)
        {
            self.report_dry_run_denial(connection.source, request, &policy);
        }
        decision.denial.map_or(Ok(()), Err)
    }

    /// The workload that has an address, unless the peer at that address verified as another
    /// identity: then nothing about the workload is known to be true of the peer.
    pub(super) fn source_workload<'a>(
        &self,
        model: &'a Model,
        address: IpAddr,
        verified: Option<&SpiffeId>,
    ) -> Option<&'a Arc<Workload>> {
        let workload = model.workload_by_ip(address)?;
        let is_same_identity = verified.is_none_or(|verified| {
            let known = &workload.identity;
            verified.path() == known.path()
                && self.same_trust_domain(known, verified.trust_domain())
        });
        is_same_identity.then_some(workload)
    }

    /// Whether a trust domain is that of this pod's identity, or an alias of it. A root may sign
    /// for several trust domains; identities of the others have no meaning in this mesh.
    pub(super) fn same_trust_domain(&self, pod: &SpiffeId, peer: &TrustDomain) -> bool {
        pod.trust_domain() == peer || self.trust_domain_aliases().contains(peer)
    }

    /// The identity, and the same identity in every alias of the trust domain. While a mesh
    /// migrates to another trust domain, nodes use either name.
    pub(super) fn with_aliases(&self, identity: &SpiffeId) -> Vec<SpiffeId> {
        let aliases = self.trust_domain_aliases().iter();
        let renamed = aliases
            .filter_map(|name| SpiffeId::new(format!("spiffe://{name}{}", identity.path())).ok());
        std::iter::once(identity.clone()).chain(renamed).collect()
    }

    fn report_dry_run_denial(&self, source: SocketAddr, request: &AuthzRequest, policy: &Arc<str>) {
        self.telemetry().record_dry_run_denial(policy);
        tracing::event!(
            target: "access",
            tracing::Level::INFO,
            src.addr = %source,
            src.identity = request.identity.as_deref().map(tracing::field::display),
            dst.addr = %request.destination,
            pod = %self.uid,
            direction = "inbound",
            policy = &**policy,
            "a dry-run policy would deny the connection"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{cart, cart_with_aliases};
    use super::*;

    fn id(text: &str) -> SpiffeId {
        SpiffeId::new(text).unwrap()
    }

    #[tokio::test]
    async fn source_workload_has_the_address_and_the_verified_identity() {
        let (store, pod) = cart();
        let model = store.load();
        let address = "10.0.0.1".parse().unwrap();
        let source = |verified: Option<&str>| {
            let verified = verified.map(id);
            let source = pod.source_workload(&model, address, verified.as_ref());
            source.map(|workload| workload.name.to_string())
        };
        assert_eq!(source(None).as_deref(), Some("web"));
        let web = "spiffe://cluster.local/ns/shop/sa/web";
        assert_eq!(source(Some(web)).as_deref(), Some("web"));
        assert_eq!(source(Some("spiffe://cluster.local/ns/shop/sa/cart")), None);
        assert_eq!(source(Some("spiffe://old.example/ns/shop/sa/web")), None);
        let unassigned = "10.0.0.9".parse().unwrap();
        assert!(pod.source_workload(&model, unassigned, None).is_none());
    }

    #[tokio::test]
    async fn alias_of_the_trust_domain_names_the_same_identity() {
        let (store, pod) = cart_with_aliases(vec!["old.example".parse().unwrap()]);
        let old = id("spiffe://old.example/ns/shop/sa/web");
        let web = id("spiffe://cluster.local/ns/shop/sa/web");
        assert!(pod.same_trust_domain(&web, old.trust_domain()));
        let model = store.load();
        assert!(
            pod.source_workload(&model, "10.0.0.1".parse().unwrap(), Some(&old))
                .is_some()
        );
        assert_eq!(pod.with_aliases(&web), [web, old]);
    }
}
