//! Extracts the ports that a pod declares, and the ports of the kubelet's probes and hooks.

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::values::port_at;
use crate::diagnostic::Diagnostics;
use crate::id::NamedPort;

/// The containers that run as long as the pod, each with the path of its field: ordinary ones, and
/// init containers with `restartPolicy: Always`.
fn containers(spec: &core::PodSpec) -> impl Iterator<Item = (String, &core::Container)> {
    let ordinary = spec.containers.iter().enumerate();
    let ordinary = ordinary.map(|(i, c)| (format!("spec.containers[{i}]"), c));
    let staying = spec.init_containers.iter().flatten().enumerate();
    let staying = staying
        .filter(|(_, c)| c.restart_policy.as_deref() == Some("Always"))
        .map(|(i, c)| (format!("spec.initContainers[{i}]"), c));
    ordinary.chain(staying)
}

/// Named TCP ports. Of two ports with one name the first counts, as in Kubernetes.
pub(super) fn named(spec: &core::PodSpec, diagnostics: &mut Diagnostics) -> Vec<NamedPort> {
    let mut named: Vec<NamedPort> = Vec::new();
    for (path, container) in containers(spec) {
        for (i, port) in container.ports.iter().flatten().enumerate() {
            let field = format!("{path}.ports[{i}].containerPort");
            let number = port_at(port.container_port, field, diagnostics);
            if let (Some(number), Some(name), true) = (number, &port.name, is_tcp(&port.protocol))
                && !named.iter().any(|known| *known.name == **name)
            {
                named.push(NamedPort {
                    name: name.as_str().into(),
                    port: number,
                });
            }
        }
    }
    named
}

pub(super) fn is_tcp(protocol: &Option<String>) -> bool {
    matches!(protocol.as_deref(), None | Some("" | "TCP"))
}

/// The ports that the kubelet connects to, for probes and HTTP hooks. Sorted, without duplicates.
pub(super) fn probed(spec: &core::PodSpec, diagnostics: &mut Diagnostics) -> Vec<u16> {
    let mut ports = Vec::new();
    for (path, container) in containers(spec) {
        for (field, call) in calls(container) {
            ports.extend(call.port(container, &format!("{path}.{field}"), diagnostics));
        }
    }
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// A port that the kubelet connects to.
enum Call<'a> {
    Number(i32),
    NumberOrName(&'a IntOrString),
}

impl Call<'_> {
    fn port(
        &self,
        container: &core::Container,
        path: &str,
        diagnostics: &mut Diagnostics,
    ) -> Option<u16> {
        match self {
            Call::Number(number) => port_at(*number, format!("{path}.port"), diagnostics),
            Call::NumberOrName(IntOrString::Int(number)) => {
                port_at(*number, format!("{path}.port"), diagnostics)
            }
            Call::NumberOrName(IntOrString::String(name)) => {
                let ports = container.ports.iter().flatten();
                let named = ports.into_iter().find(|p| p.name.as_deref() == Some(name));
                // The kubelet reads a number in quotes as a number when no port has that name.
                match named
                    .map(|p| p.container_port)
                    .or_else(|| name.parse().ok())
                {
                    Some(number) => port_at(number, format!("{path}.port"), diagnostics),
                    None => {
                        let message = format!("the container has no port named {name:?}");
                        diagnostics.error(format!("{path}.port"), "named_port_missing", message);
                        None
                    }
                }
            }
        }
    }
}

fn calls(container: &core::Container) -> Vec<(&'static str, Call<'_>)> {
    let probes = [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ];
    let mut calls = Vec::new();
    for (field, probe) in probes.iter().filter_map(|(f, p)| Some((*f, p.as_ref()?))) {
        calls.extend(
            probe
                .http_get
                .as_ref()
                .and_then(http)
                .map(|call| (field, call)),
        );
        calls.extend(
            probe
                .tcp_socket
                .as_ref()
                .and_then(tcp)
                .map(|call| (field, call)),
        );
        calls.extend(
            probe
                .grpc
                .as_ref()
                .map(|grpc| (field, Call::Number(grpc.port))),
        );
    }
    let lifecycle = container.lifecycle.as_ref();
    let hooks = [
        (
            "lifecycle.postStart",
            lifecycle.and_then(|l| l.post_start.as_ref()),
        ),
        (
            "lifecycle.preStop",
            lifecycle.and_then(|l| l.pre_stop.as_ref()),
        ),
    ];
    for (field, hook) in hooks.iter().filter_map(|(f, h)| Some((*f, (*h)?))) {
        calls.extend(
            hook.http_get
                .as_ref()
                .and_then(http)
                .map(|call| (field, call)),
        );
    }
    calls
}

/// A call with a host goes there and not to the pod.
fn http(action: &core::HTTPGetAction) -> Option<Call<'_>> {
    to_pod(&action.host).then_some(Call::NumberOrName(&action.port))
}

fn tcp(action: &core::TCPSocketAction) -> Option<Call<'_>> {
    to_pod(&action.host).then_some(Call::NumberOrName(&action.port))
}

fn to_pod(host: &Option<String>) -> bool {
    host.as_deref().is_none_or(str::is_empty)
}
