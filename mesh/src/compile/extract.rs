//! The first step: extracts what each object contains, without looking at other objects.

mod namespace;
mod node;
mod owner;
mod pod;
mod ports;
mod service;
mod slice;
mod values;

use std::net::IpAddr;
use std::sync::Arc;

use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::id::ObjectRef;
use crate::model::{AddressRefusal, Namespace, Node};
use crate::names;
use crate::objects::{Kind, Object, Objects, PolicyKind};
use crate::params::Params;
use crate::policy::{Context, ParsedPolicy};

use super::Extracted;

pub(super) use pod::{ExtractedPod, PodExtraction};
pub(super) use service::{ExtractedService, ServiceExtraction, TargetPort};
pub(super) use slice::{ExtractedSlice, SliceEndpoint};

/// All extracted objects.
#[derive(Debug, Default)]
pub(super) struct ExtractedObjects {
    pub(super) namespaces: Vec<Extracted<Namespace>>,
    pub(super) nodes: Vec<Extracted<Node>>,
    pub(super) pods: Vec<Extracted<ExtractedPod>>,
    pub(super) services: Vec<Extracted<ExtractedService>>,
    pub(super) slices: Vec<Extracted<ExtractedSlice>>,
    /// Sorted by kind, namespace and name.
    pub(super) policies: Vec<Extracted<Arc<ParsedPolicy>>>,
    /// Diagnostics of policy versions that the source rejected.
    pub(super) rejected: Vec<Diagnostic>,
    pub(super) network_policy: bool,
    /// Addresses of pods and services that could not be read.
    pub(super) refused: Vec<(IpAddr, AddressRefusal)>,
    pub(super) excluded_namespaces: Vec<Arc<str>>,
}

/// Reads every object, and reports the diagnostics of each.
pub(super) fn all(
    objects: &Objects,
    params: &Params,
    diagnostics: &mut Vec<Diagnostic>,
) -> ExtractedObjects {
    let rejected = diagnostics
        .iter()
        .filter(|diagnostic| is_of_policy(diagnostic));
    let rejected = rejected.cloned().collect();
    let mut extracted = ExtractedObjects {
        policies: policies(objects, params, diagnostics),
        rejected,
        network_policy: params.network_policy,
        namespaces: each(
            &objects.namespaces,
            Object::Namespace,
            diagnostics,
            namespace::read,
        ),
        nodes: each(&objects.nodes, Object::Node, diagnostics, node::read),
        slices: each(
            &objects.slices,
            Object::EndpointSlice,
            diagnostics,
            slice::read,
        ),
        excluded_namespaces: params
            .excluded_namespaces
            .iter()
            .map(|n| n.as_str().into())
            .collect(),
        ..ExtractedObjects::default()
    };
    each(
        &objects.service_accounts,
        Object::ServiceAccount,
        diagnostics,
        |o, f| {
            names::check(
                &o.metadata,
                names::Scope::Namespaced(names::Form::Subdomain),
                f,
            );
            None::<()>
        },
    );
    let services = each(&objects.services, Object::Service, diagnostics, |o, f| {
        service::read(o, params, f)
    });
    services
        .into_iter()
        .for_each(|service| extracted.service(service));
    let pods = each(&objects.pods, Object::Pod, diagnostics, |o, f| {
        pod::read(o, params, f)
    });
    pods.into_iter().for_each(|pod| extracted.pod(pod));
    extracted
}

fn policies(
    objects: &Objects,
    params: &Params,
    diagnostics: &mut Vec<Diagnostic>,
) -> Vec<Extracted<Arc<ParsedPolicy>>> {
    let context = Context::new(params);
    let kinds = [
        &objects.authorization_policies,
        &objects.network_policies,
        &objects.peer_authentications,
    ];
    let mut extracted = Vec::new();
    for kind in kinds {
        extracted.extend(each(kind, Object::Policy, diagnostics, |policy, found| {
            let read = policy.read(&context);
            found.extend(&read.diagnostics);
            Some(read)
        }));
    }
    extracted
}

fn is_of_policy(diagnostic: &Diagnostic) -> bool {
    let object = diagnostic.object.as_ref();
    object.is_some_and(|object| {
        let mut kinds = PolicyKind::ALL.iter();
        kinds.any(|kind| *object.kind == *kind.as_str())
    })
}

impl ExtractedObjects {
    fn service(&mut self, service: Extracted<ServiceExtraction>) {
        let Extracted {
            value,
            reference,
            origin,
        } = service;
        match value {
            ServiceExtraction::Usable(value) => self.services.push(Extracted {
                value: *value,
                reference,
                origin,
            }),
            ServiceExtraction::Unreadable { vips } => {
                self.refuse(vips, AddressRefusal::InvalidService);
            }
        }
    }

    fn pod(&mut self, pod: Extracted<PodExtraction>) {
        let Extracted {
            value,
            reference,
            origin,
        } = pod;
        match value {
            PodExtraction::Live(value) => self.pods.push(Extracted {
                value: *value,
                reference,
                origin,
            }),
            PodExtraction::Unreadable { ips } => self.refuse(ips, AddressRefusal::InvalidWorkload),
        }
    }

    fn refuse(&mut self, addresses: Vec<IpAddr>, refusal: AddressRefusal) {
        self.refused
            .extend(addresses.into_iter().map(|ip| (ip, refusal)));
    }
}

/// Reads one object for its diagnostics only.
pub(super) fn one(object: &Object, params: &Params) -> Vec<Diagnostic> {
    let mut found = Diagnostics::default();
    match object {
        Object::Namespace(o) => drop(namespace::read(o, &mut found)),
        Object::Node(o) => drop(node::read(o, &mut found)),
        Object::Pod(o) => drop(pod::read(o, params, &mut found)),
        Object::Service(o) => drop(service::read(o, params, &mut found)),
        Object::EndpointSlice(o) => drop(slice::read(o, &mut found)),
        Object::Policy(o) => found.extend(&o.read(&Context::new(params)).diagnostics),
        Object::ServiceAccount(o) => names::check(
            &o.metadata,
            names::Scope::Namespaced(names::Form::Subdomain),
            &mut found,
        ),
    }
    found.into_vec()
}

fn each<T, F>(
    kind: &Kind<T>,
    object: fn(Arc<T>) -> Object,
    diagnostics: &mut Vec<Diagnostic>,
    mut read: impl FnMut(&T, &mut Diagnostics) -> Option<F>,
) -> Vec<Extracted<F>> {
    let mut extracted = Vec::with_capacity(kind.len());
    for sourced in kind.values() {
        let mut found = Diagnostics::default();
        let value = read(&sourced.object, &mut found);
        let reference = object(sourced.object.clone()).reference();
        report(found, &reference, sourced, diagnostics);
        extracted.extend(value.map(|value| Extracted {
            value,
            reference,
            origin: sourced.origin.clone(),
        }));
    }
    extracted
}

fn report<T>(
    found: Diagnostics,
    reference: &ObjectRef,
    sourced: &crate::objects::Sourced<T>,
    diagnostics: &mut Vec<Diagnostic>,
) {
    let found = found.into_vec().into_iter();
    diagnostics.extend(found.map(|d| d.at(reference.clone(), &sourced.origin)));
}
