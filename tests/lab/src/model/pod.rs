//! A pod: its manifest, its validation, and its observed status.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Container, EnvVar, Namespace, Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use crate::options::IpFamily;

/// Annotation: fixed addresses, comma-separated. Other families get an allocated address.
const FIXED_IP: &str = "lab.ambit.dev/ip";
/// Annotation: `IPv4`, `IPv6` or both, comma-separated; default both.
const IP_FAMILIES: &str = "lab.ambit.dev/ip-families";
/// Istio's opt-in label, on namespaces and pods.
const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";

/// status.phase
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

impl Phase {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// The status of a pod as its kubelet task reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KubeletStatus {
    /// Whether the network namespace is set up, so that the pod has its addresses.
    pub(crate) has_sandbox: bool,
    pub(crate) phase: Phase,
    pub(crate) ready: bool,
    pub(crate) restarts: u32,
    /// What the pod waits for or why it fails; empty otherwise.
    pub(crate) message: String,
}

impl Default for KubeletStatus {
    fn default() -> Self {
        let message = String::new();
        Self {
            has_sandbox: false,
            phase: Phase::Pending,
            ready: false,
            restarts: 0,
            message,
        }
    }
}

/// A scheduled pod with its addresses.
#[derive(Debug, Clone)]
pub(crate) struct PodEntry {
    /// The manifest, with uid, node and service account filled in.
    pub(crate) object: Pod,
    pub(crate) uid: String,
    pub(crate) node: String,
    pub(crate) netns: String,
    pub(crate) ips: Vec<IpAddr>,
    /// The node's own addresses.
    pub(crate) node_ips: Vec<IpAddr>,
    pub(crate) created: Time,
    pub(crate) status: KubeletStatus,
    /// Set while the pod terminates: since when, and the grace period in seconds.
    pub(crate) deleting: Option<(Time, u64)>,
}

impl PodEntry {
    pub(crate) fn spec(&self) -> PodSpec {
        self.object.spec.clone().unwrap_or_default()
    }

    pub(crate) fn host_network(&self) -> bool {
        host_network(&self.object)
    }

    /// The environment of a container: what a container runtime sets, then the manifest's variables.
    pub(crate) fn environment(
        &self,
        container: Option<&Container>,
        tmp: &str,
    ) -> BTreeMap<String, String> {
        let name = self.object.metadata.name.clone().unwrap_or_default();
        let mut env = BTreeMap::from([
            ("HOSTNAME".to_owned(), name),
            ("TMPDIR".to_owned(), tmp.to_owned()),
        ]);
        for variable in container
            .and_then(|container| container.env.as_ref())
            .into_iter()
            .flatten()
        {
            let value = match &variable.value {
                Some(value) => expand(value, &env),
                None => field_path(variable)
                    .and_then(|path| self.field(path))
                    .unwrap_or_default(),
            };
            env.insert(variable.name.clone(), value);
        }
        env
    }

    /// A field of the downward API; `None` for an unsupported path.
    fn field(&self, path: &str) -> Option<String> {
        let meta = &self.object.metadata;
        let ips = || self.ips.iter().map(ToString::to_string).collect::<Vec<_>>();
        let value = |map: &Option<BTreeMap<String, String>>, key: &str| {
            map.as_ref()
                .and_then(|map| map.get(key))
                .cloned()
                .unwrap_or_default()
        };
        Some(match path {
            "metadata.name" => meta.name.clone().unwrap_or_default(),
            "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
            "metadata.uid" => self.uid.clone(),
            "spec.nodeName" => self.node.clone(),
            "spec.serviceAccountName" => self.spec().service_account_name.unwrap_or_default(),
            "status.podIP" => ips().into_iter().next().unwrap_or_default(),
            "status.podIPs" => ips().join(","),
            _ => {
                let keyed = |prefix: &str| path.strip_prefix(prefix)?.strip_suffix("']");
                match (keyed("metadata.labels['"), keyed("metadata.annotations['")) {
                    (Some(key), _) => value(&meta.labels, key),
                    (_, Some(key)) => value(&meta.annotations, key),
                    _ => return None,
                }
            }
        })
    }

    /// The program and its arguments, with variables expanded.
    pub(crate) fn command(container: &Container, env: &BTreeMap<String, String>) -> Vec<String> {
        let words = container
            .command
            .iter()
            .flatten()
            .chain(container.args.iter().flatten());
        words.map(|word| expand(word, env)).collect()
    }
}

fn field_path(variable: &EnvVar) -> Option<&str> {
    Some(&variable.value_from.as_ref()?.field_ref.as_ref()?.field_path)
}

/// Expands `$(NAME)` as Kubernetes does: an unknown name is kept, `$$` is a dollar sign.
fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let reference = after
            .strip_prefix('(')
            .and_then(|name| name.split_once(')'));
        rest = match (after.strip_prefix('$'), reference) {
            (Some(after), _) => {
                expanded.push('$');
                after
            }
            (None, Some((name, after))) if env.contains_key(name) => {
                expanded.push_str(&env[name]);
                after
            }
            _ => {
                expanded.push('$');
                after
            }
        };
    }
    expanded + rest
}

/// Checks a pod. Unsupported fields are an error where ignoring them would change what a test shows.
pub(crate) fn validate(pod: &Pod) -> Result<()> {
    let spec = pod.spec.as_ref().context("spec is missing")?;
    if spec.containers.is_empty() {
        bail!("spec.containers is empty");
    }
    for container in spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
    {
        validate_container(container).with_context(|| format!("container {}", container.name))?;
    }
    families(&pod.metadata)?;
    fixed_ips(&pod.metadata)?;
    Ok(())
}

fn validate_container(container: &Container) -> Result<()> {
    if container.command.as_ref().is_none_or(Vec::is_empty) {
        bail!("command is missing: the lab runs programs, not images");
    }
    for variable in container.env.iter().flatten() {
        if variable.value_from.is_some() && field_path(variable).is_none() {
            bail!(
                "env {}: only value and fieldRef are supported",
                variable.name
            );
        }
    }
    if container
        .env_from
        .as_ref()
        .is_some_and(|from| !from.is_empty())
    {
        bail!("envFrom is not supported");
    }
    if container
        .volume_mounts
        .as_ref()
        .is_some_and(|mounts| !mounts.is_empty())
    {
        bail!("volumeMounts are not supported");
    }
    let probes = [
        &container.startup_probe,
        &container.readiness_probe,
        &container.liveness_probe,
    ];
    if probes
        .into_iter()
        .flatten()
        .any(|probe| probe.grpc.is_some())
    {
        bail!("grpc probes are not supported, only httpGet, tcpSocket and exec");
    }
    Ok(())
}

pub(crate) fn host_network(pod: &Pod) -> bool {
    pod.spec
        .as_ref()
        .and_then(|spec| spec.host_network)
        .unwrap_or(false)
}

/// The IP families of the pod.
pub(crate) fn families(meta: &ObjectMeta) -> Result<Vec<IpFamily>> {
    let Some(text) = annotation(meta, IP_FAMILIES) else {
        return Ok(IpFamily::ALL.to_vec());
    };
    text.split(',')
        .map(|family| family_named(family.trim()))
        .collect()
}

pub(crate) fn family_named(name: &str) -> Result<IpFamily> {
    match name {
        "IPv4" => Ok(IpFamily::V4),
        "IPv6" => Ok(IpFamily::V6),
        _ => bail!("{name:?} is not an IP family: use IPv4 or IPv6"),
    }
}

/// The fixed addresses of the pod.
pub(crate) fn fixed_ips(meta: &ObjectMeta) -> Result<Vec<IpAddr>> {
    let Some(text) = annotation(meta, FIXED_IP) else {
        return Ok(Vec::new());
    };
    let parse = |ip: &str| {
        ip.trim()
            .parse()
            .with_context(|| format!("annotation {FIXED_IP}: {ip:?}"))
    };
    text.split(',').map(parse).collect()
}

fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

/// Whether the pod is opted in to the mesh, by the rules of Istio's CNI plugin: the pod's label takes
/// precedence over its namespace's. Pods with host network or a sidecar and pods in kube-system are
/// never opted in.
pub(crate) fn meshed(pod: &Pod, namespace: Option<&Namespace>) -> bool {
    let mode = |meta: &ObjectMeta| {
        meta.labels
            .as_ref()
            .and_then(|l| l.get(DATAPLANE_MODE))
            .cloned()
    };
    let own = mode(&pod.metadata);
    let inherited = namespace.and_then(|namespace| mode(&namespace.metadata));
    let is_excluded = host_network(pod)
        || annotation(&pod.metadata, "sidecar.istio.io/status").is_some()
        || pod.metadata.namespace.as_deref() == Some("kube-system");
    !is_excluded && own.or(inherited).as_deref() == Some("ambient")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(text: &str) -> Pod {
        serde_yaml_ng::from_str(text).unwrap()
    }

    fn namespace(mode: &str) -> Namespace {
        let text = format!("metadata: {{name: n, labels: {{istio.io/dataplane-mode: {mode}}}}}");
        serde_yaml_ng::from_str(&text).unwrap()
    }

    #[test]
    fn pod_label_takes_precedence_over_namespace_label() {
        let plain = pod("metadata: {name: p}");
        let out = pod("metadata: {name: p, labels: {istio.io/dataplane-mode: none}}");
        let own = pod("metadata: {name: p, labels: {istio.io/dataplane-mode: ambient}}");
        assert!(meshed(&plain, Some(&namespace("ambient"))));
        assert!(!meshed(&out, Some(&namespace("ambient"))));
        assert!(meshed(&own, Some(&namespace("none"))));
        assert!(!meshed(&plain, None));
    }

    #[test]
    fn host_network_sidecars_and_kube_system_are_never_meshed() {
        let label = "labels: {istio.io/dataplane-mode: ambient}";
        for text in [
            format!(
                "{{metadata: {{name: p, {label}}}, spec: {{hostNetwork: true, containers: []}}}}"
            ),
            format!("metadata: {{name: p, {label}, annotations: {{sidecar.istio.io/status: x}}}}"),
            format!("metadata: {{name: p, namespace: kube-system, {label}}}"),
        ] {
            assert!(!meshed(&pod(&text), None), "{text}");
        }
    }

    #[test]
    fn variables_expand_as_in_kubernetes() {
        let env = BTreeMap::from([("A".to_owned(), "1".to_owned())]);
        assert_eq!(expand("$(A) $(B) $$(A) $A $", &env), "1 $(B) $(A) $A $");
    }

    #[test]
    fn container_without_a_command_is_refused() {
        let pod = pod("{metadata: {name: p}, spec: {containers: [{name: c, image: nginx}]}}");
        let error = format!("{:#}", validate(&pod).unwrap_err());
        assert!(error.contains("runs programs, not images"), "{error}");
    }

    #[test]
    fn unsupported_fields_are_refused() {
        for (field, message) in [
            ("livenessProbe: {grpc: {port: 9}}", "grpc probes"),
            ("volumeMounts: [{name: v, mountPath: /v}]", "volumeMounts"),
            ("envFrom: [{configMapRef: {name: c}}]", "envFrom"),
        ] {
            let spec = format!("containers: [{{name: c, command: [sh], {field}}}]");
            let pod = pod(&format!("{{metadata: {{name: p}}, spec: {{{spec}}}}}"));
            let error = format!("{:#}", validate(&pod).unwrap_err());
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn downward_api_sets_the_environment() {
        let object = pod(
            "{metadata: {name: p, namespace: n, labels: {app: x}}, spec: {containers: [{name: c, env: [
              {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}},
              {name: APP, valueFrom: {fieldRef: {fieldPath: \"metadata.labels['app']\"}}},
              {name: URL, value: 'http://$(IP)/'}]}]}}",
        );
        let entry = PodEntry {
            object,
            uid: String::new(),
            node: String::new(),
            netns: String::new(),
            ips: vec!["10.244.1.2".parse().unwrap()],
            node_ips: Vec::new(),
            created: Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH),
            status: KubeletStatus::default(),
            deleting: None,
        };
        let env = entry.environment(entry.spec().containers.first(), "/t");
        assert_eq!(
            (env["URL"].as_str(), env["APP"].as_str()),
            ("http://10.244.1.2/", "x")
        );
    }
}
