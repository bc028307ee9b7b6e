//! Extracts pods: identity, addresses, mode and health.

use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use spiffe::SpiffeId;

use super::{owner, ports, values};
use crate::diagnostic::Diagnostics;
use crate::id::WorkloadUid;
use crate::model::{Health, Load, Locality, Mode, Workload};
use crate::names::namespace_of;
use crate::names::{self, Form, Scope};
use crate::params::Params;
use crate::policy::PolicySet;

/// What a pod contains.
#[derive(Clone, Debug)]
pub(in crate::compile) struct ExtractedPod {
    /// Complete but for mode, locality and services, which depend on other objects.
    pub(in crate::compile) workload: Workload,
    /// The mode of its own label.
    pub(in crate::compile) mode: Option<Mode>,
    /// It has Istio's sidecar, which meshes it already.
    pub(in crate::compile) has_sidecar: bool,
}

/// The result for a pod that is not finished.
pub(in crate::compile) enum PodExtraction {
    Live(Box<ExtractedPod>),
    /// Its identity is not certain, but its addresses are, so they are refused.
    Unreadable {
        ips: Vec<IpAddr>,
    },
}

/// Reads a pod; `None` if it is finished, because its address may belong to another pod already.
pub(super) fn read(
    pod: &core::Pod,
    params: &Params,
    diagnostics: &mut Diagnostics,
) -> Option<PodExtraction> {
    let status = pod.status.clone().unwrap_or_default();
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let spec = pod.spec.clone().unwrap_or_default();
    let ips = addresses(&status, diagnostics);
    let mode = values::dataplane_mode(&pod.metadata, diagnostics);
    let host_network = spec.host_network == Some(true);
    if host_network && mode == Some(Mode::Mesh) {
        let message = "a pod on the host's network cannot be meshed".to_owned();
        diagnostics.error("spec.hostNetwork", "host_network", message);
    }
    let Some(workload) = workload(pod, &spec, &status, ips.clone(), params, diagnostics) else {
        // Other pods share the addresses of a host-network pod.
        let ips = if host_network { Vec::new() } else { ips };
        return Some(PodExtraction::Unreadable { ips });
    };
    Some(PodExtraction::Live(Box::new(ExtractedPod {
        workload,
        mode,
        has_sidecar: values::annotation(&pod.metadata, "sidecar.istio.io/status").is_some(),
    })))
}

fn workload(
    pod: &core::Pod,
    spec: &core::PodSpec,
    status: &core::PodStatus,
    ips: Vec<IpAddr>,
    params: &Params,
    diagnostics: &mut Diagnostics,
) -> Option<Workload> {
    let meta = &pod.metadata;
    names::check(meta, Scope::Namespaced(Form::Subdomain), diagnostics);
    let (namespace, name) = (namespace_of(meta), meta.name.as_deref().unwrap_or_default());
    let kube_uid = meta.uid.as_deref().unwrap_or_default();
    if !names::is_uid(kube_uid) {
        diagnostics.fatal(
            "metadata.uid",
            "bad_uid",
            format!("{kube_uid:?} is not a valid pod uid"),
        );
    }
    let node = spec.node_name.as_deref().unwrap_or_default();
    if !node.is_empty() && !Form::Subdomain.admits(node) {
        diagnostics.fatal(
            "spec.nodeName",
            "bad_name",
            format!("{node:?} is not a valid node name"),
        );
    }
    let service_account = service_account(spec);
    let identity = identity(params, namespace, service_account, diagnostics);
    let (workload_type, workload_name) = owner::workload(meta);
    let (canonical_name, canonical_revision) = owner::canonical(meta, &workload_name);
    let text = |key, other| {
        values::label(meta, key)
            .or_else(|| values::label(meta, other))
            .unwrap_or_default()
    };
    let workload = Workload {
        uid: WorkloadUid::of_pod(&params.cluster, namespace, name, kube_uid),
        name: name.into(),
        namespace: namespace.into(),
        service_account: service_account.into(),
        identity: identity?,
        ips,
        node: node.into(),
        locality: Locality::default(),
        host_network: spec.host_network == Some(true),
        mode: Mode::Plain,
        health: health(pod, status),
        canonical_name: canonical_name.into(),
        canonical_revision: canonical_revision.into(),
        workload_type,
        workload_name: workload_name.into(),
        app: text("app", "app.kubernetes.io/name").into(),
        version: text("version", "app.kubernetes.io/version").into(),
        cluster: params.cluster.clone(),
        probe_ports: ports::probed(spec, diagnostics),
        ports: ports::named(spec, diagnostics),
        services: Vec::new(),
        labels: Arc::new(meta.labels.clone().unwrap_or_default()),
        policies: PolicySet::default(),
        kube_uid: kube_uid.into(),
        load: Load::default(),
    };
    (!diagnostics.is_fatal()).then_some(workload)
}

fn service_account(spec: &core::PodSpec) -> &str {
    let named = [&spec.service_account_name, &spec.service_account];
    named
        .into_iter()
        .flatten()
        .find(|name| !name.is_empty())
        .map_or("default", String::as_str)
}

/// Checks namespace and account before they become path segments, so that no name can forge another
/// identity.
fn identity(
    params: &Params,
    namespace: &str,
    service_account: &str,
    diagnostics: &mut Diagnostics,
) -> Option<SpiffeId> {
    if !Form::Subdomain.admits(service_account) {
        let message = format!("{service_account:?} is not a valid service account name");
        diagnostics.fatal("spec.serviceAccountName", "bad_name", message);
        return None;
    }
    if !Form::Label.admits(namespace) {
        return None;
    }
    let segments = ["ns", namespace, "sa", service_account];
    SpiffeId::from_segments(params.trust_domain.clone(), &segments)
        .map_err(|error| {
            diagnostics.fatal("spec.serviceAccountName", "bad_identity", error.to_string());
        })
        .ok()
}

/// The addresses, primary first. Kubernetes assigns one per family; a second one is an error.
fn addresses(status: &core::PodStatus, diagnostics: &mut Diagnostics) -> Vec<IpAddr> {
    let listed = status.pod_ips.iter().flatten().enumerate();
    let listed = listed.map(|(i, ip)| (format!("status.podIPs[{i}].ip"), Some(ip.ip.as_str())));
    let single = [("status.podIP".to_owned(), status.pod_ip.as_deref())];
    let mut ips: Vec<IpAddr> = Vec::new();
    for (field, text) in listed.chain(single) {
        let Some(text) = text.filter(|text| !text.is_empty()) else {
            continue;
        };
        let Some(ip) = values::ip_at(text, field.as_str(), diagnostics) else {
            continue;
        };
        match ips.iter().find(|known| known.is_ipv6() == ip.is_ipv6()) {
            None => ips.push(ip),
            Some(known) if *known == ip => {}
            Some(known) => {
                diagnostics.error(
                    field,
                    "bad_ip",
                    format!("{ip} and {known}: only one per family"),
                );
            }
        }
    }
    ips
}

fn health(pod: &core::Pod, status: &core::PodStatus) -> Health {
    let conditions = status.conditions.iter().flatten();
    let serving = conditions
        .into_iter()
        .any(|c| c.type_ == "Ready" && c.status == "True");
    let terminating = pod.metadata.deletion_timestamp.is_some();
    Health {
        ready: serving && !terminating,
        serving,
        terminating,
    }
}
