//! The objects of the cluster, and the rules by which they come and go.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde_json::Value;

use super::Key;
use super::endpoints::{self, SERVICE_NAME};
use super::hosts::Named;
use super::ipam::Pool;
use super::manifest::{self, Object};
use super::pod::{self, PodEntry, Progress};
use super::proxy::{self, Frontend};
use super::render;
use super::schedule::{Candidate, schedule};
use super::service;
use super::topology;
use crate::options::Family;

const ZONE: &str = "topology.kubernetes.io/zone";

/// A node, its number in the lab, and the addresses it gives to pods.
#[derive(Debug, Clone)]
pub(crate) struct NodeEntry {
    pub(crate) object: Node,
    pub(crate) index: u8,
    pub(crate) netns: String,
    pools: [Pool; 2],
}

/// What is new after an apply and needs doing in the world.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Created {
    pub(crate) nodes: Vec<String>,
    pub(crate) pods: Vec<Key>,
}

/// The state of the cluster.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    lab: String,
    pub(crate) nodes: BTreeMap<String, NodeEntry>,
    pub(crate) namespaces: BTreeMap<String, Namespace>,
    service_accounts: BTreeMap<Key, ServiceAccount>,
    pub(crate) services: BTreeMap<Key, Service>,
    slices: BTreeMap<Key, EndpointSlice>,
    pub(crate) pods: BTreeMap<Key, PodEntry>,
    others: BTreeMap<(String, String, String), Value>,
    service_ips: [Pool; 2],
    turn: usize,
}

impl Cluster {
    /// A cluster as a new one is: with the namespaces that are always there.
    pub(crate) fn new(lab: &str) -> Self {
        let mut cluster = Self {
            lab: lab.to_owned(),
            nodes: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            service_accounts: BTreeMap::new(),
            services: BTreeMap::new(),
            slices: BTreeMap::new(),
            pods: BTreeMap::new(),
            others: BTreeMap::new(),
            service_ips: topology::service_pools(),
            turn: 0,
        };
        for name in ["default", "kube-system"] {
            let metadata = ObjectMeta {
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            };
            cluster.put_namespace(Namespace {
                metadata,
                ..Namespace::default()
            });
        }
        cluster
    }

    /// Creates or updates one object. `uid` makes up a pod's uid.
    pub(crate) fn put(
        &mut self,
        object: Object,
        uid: &dyn Fn() -> String,
        created: &mut Created,
    ) -> Result<()> {
        match object {
            Object::Node(node) => self.put_node(*node, created),
            Object::Namespace(namespace) => {
                self.put_namespace(namespace);
                Ok(())
            }
            Object::ServiceAccount(mut account) => {
                let key = self.namespaced("ServiceAccount", &mut account.metadata)?;
                self.service_accounts.insert(key, account);
                Ok(())
            }
            Object::Service(service) => self.put_service(*service),
            Object::EndpointSlice(mut slice) => {
                let key = self.namespaced("EndpointSlice", &mut slice.metadata)?;
                self.slices.insert(key, slice);
                Ok(())
            }
            Object::Pod(pod) => self.put_pod(*pod, uid, created),
            Object::Other(value) => {
                self.others.insert(other_key(&value), value);
                Ok(())
            }
        }
    }

    fn put_node(&mut self, object: Node, created: &mut Created) -> Result<()> {
        let name = object.metadata.name.clone().unwrap_or_default();
        if let Some(entry) = self.nodes.get_mut(&name) {
            entry.object = object;
            return Ok(());
        }
        let index = u8::try_from(self.nodes.len() + 1)
            .ok()
            .filter(|index| *index <= topology::MAX_NODES);
        let index = index.with_context(|| format!("more than {} nodes", topology::MAX_NODES))?;
        let netns = format!("ambit-{}-node-{name}", self.lab);
        let pools = topology::pod_pools(index);
        self.nodes.insert(
            name.clone(),
            NodeEntry {
                object,
                index,
                netns,
                pools,
            },
        );
        created.nodes.push(name);
        Ok(())
    }

    /// A namespace comes with its default service account.
    fn put_namespace(&mut self, namespace: Namespace) {
        let name = namespace.metadata.name.clone().unwrap_or_default();
        let metadata = ObjectMeta {
            name: Some("default".to_owned()),
            namespace: Some(name.clone()),
            ..ObjectMeta::default()
        };
        let account = ServiceAccount {
            metadata,
            ..ServiceAccount::default()
        };
        self.service_accounts
            .entry((name.clone(), "default".to_owned()))
            .or_insert(account);
        self.namespaces.insert(name, namespace);
    }

    fn put_service(&mut self, mut service: Service) -> Result<()> {
        let key = self.namespaced("Service", &mut service.metadata)?;
        let owner = format!("service {}/{}", key.0, key.1);
        let old = self
            .services
            .get(&key)
            .map(service::cluster_ips)
            .unwrap_or_default();
        let headless = service::headless(&service);
        let spec = service.spec.get_or_insert_default();
        if !old.is_empty() && !headless && spec.cluster_ip.is_none() && spec.cluster_ips.is_none() {
            // A service keeps its addresses when it changes.
            spec.cluster_ip = old.first().map(ToString::to_string);
            spec.cluster_ips = Some(old.iter().map(ToString::to_string).collect());
        }
        self.release_service_ips(&old);
        service::resolve(&mut service, &mut self.service_ips, &owner)
            .with_context(|| owner.clone())?;
        self.services.insert(key, service);
        Ok(())
    }

    fn release_service_ips(&mut self, ips: &[IpAddr]) {
        for ip in ips {
            self.service_ips
                .iter_mut()
                .for_each(|pool| pool.release(*ip));
        }
    }

    fn put_pod(
        &mut self,
        mut pod: Pod,
        uid: &dyn Fn() -> String,
        created: &mut Created,
    ) -> Result<()> {
        let key = self.namespaced("Pod", &mut pod.metadata)?;
        let place = format!("Pod {}/{}", key.0, key.1);
        pod::validate(&pod).with_context(|| place.clone())?;
        self.default_account(&mut pod, &key)
            .with_context(|| place.clone())?;
        if let Some(entry) = self.pods.get_mut(&key) {
            return entry.update(pod).context(place);
        }
        let entry = self.admit(pod, &key, uid).context(place)?;
        self.pods.insert(key.clone(), entry);
        created.pods.push(key);
        Ok(())
    }

    fn default_account(&self, pod: &mut Pod, key: &Key) -> Result<()> {
        let spec = pod.spec.get_or_insert_default();
        let account = spec
            .service_account_name
            .get_or_insert_with(|| "default".to_owned());
        if !self
            .service_accounts
            .contains_key(&(key.0.clone(), account.clone()))
        {
            bail!(
                "spec.serviceAccountName: there is no service account {}/{account}",
                key.0
            );
        }
        Ok(())
    }

    /// Scheduling and addresses.
    fn admit(&mut self, mut pod: Pod, key: &Key, uid: &dyn Fn() -> String) -> Result<PodEntry> {
        let uid = pod.metadata.uid.get_or_insert_with(uid).clone();
        let created = render::now();
        pod.metadata.creation_timestamp = Some(created.clone());
        let empty = BTreeMap::new();
        let candidates: Vec<_> = self
            .nodes
            .iter()
            .map(|(name, entry)| Candidate {
                name,
                labels: entry.object.metadata.labels.as_ref().unwrap_or(&empty),
            })
            .collect();
        let spec = pod.spec.get_or_insert_default();
        let node = schedule(spec, &candidates, self.turn)?.to_owned();
        if spec.node_name.is_none() {
            self.turn += 1;
        }
        spec.node_name = Some(node.clone());
        let entry = self.nodes.get_mut(&node).context("the node has gone")?;
        let node_ips = topology::node_addresses(entry.index).to_vec();
        let host_network = pod::host_network(&pod);
        let (netns, ips) = if host_network {
            (entry.netns.clone(), node_ips.clone())
        } else {
            let short: String = uid
                .chars()
                .filter(char::is_ascii_alphanumeric)
                .take(8)
                .collect();
            let netns = format!("ambit-{}-pod-{}.{}-{short}", self.lab, key.0, key.1);
            (
                netns,
                addresses(
                    &pod.metadata,
                    &mut entry.pools,
                    &format!("pod {}/{}", key.0, key.1),
                )?,
            )
        };
        let progress = Progress::default();
        Ok(PodEntry {
            object: pod,
            uid,
            node,
            netns,
            ips,
            node_ips,
            created,
            progress,
            deleting: None,
        })
    }

    fn namespaced(&self, kind: &str, meta: &mut ObjectMeta) -> Result<Key> {
        let key = manifest::key(meta);
        if !self.namespaces.contains_key(&key.0) {
            bail!(
                "{kind} {}/{}: there is no namespace {}",
                key.0,
                key.1,
                key.0
            );
        }
        meta.namespace = Some(key.0.clone());
        Ok(key)
    }

    /// The key of a pod by `name` or `namespace/name`.
    pub(crate) fn find_pod(&self, name: &str) -> Result<Key> {
        find(&self.pods, "pod", name)
    }

    /// Marks a pod as terminating.
    pub(crate) fn terminate(&mut self, key: &Key, grace: u64, now: Time) {
        if let Some(entry) = self.pods.get_mut(key) {
            entry.deleting.get_or_insert((now, grace));
        }
    }

    /// The pod is gone; its addresses are free.
    pub(crate) fn remove_pod(&mut self, key: &Key) {
        let Some(entry) = self.pods.remove(key) else {
            return;
        };
        let Some(node) = self.nodes.get_mut(&entry.node) else {
            return;
        };
        if !entry.host_network() {
            for ip in entry.ips {
                node.pools.iter_mut().for_each(|pool| pool.release(ip));
            }
        }
    }

    /// Removes an object that is not a pod.
    pub(crate) fn delete(&mut self, kind: &str, name: &str) -> Result<()> {
        match kind.to_ascii_lowercase().as_str() {
            "service" => {
                let key = find(&self.services, "service", name)?;
                if let Some(service) = self.services.remove(&key) {
                    self.release_service_ips(&service::cluster_ips(&service));
                }
            }
            "serviceaccount" => {
                let key = find(&self.service_accounts, "service account", name)?;
                self.service_accounts.remove(&key);
            }
            "endpointslice" => {
                let key = find(&self.slices, "endpoint slice", name)?;
                self.slices.remove(&key);
            }
            "namespace" => self.delete_namespace(name)?,
            "node" => bail!("a node cannot be deleted from a lab"),
            kind => {
                let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
                let same = |key: &(String, String, String)| {
                    key.0.eq_ignore_ascii_case(kind)
                        && (key.1.is_empty() || key.1 == namespace)
                        && key.2 == name
                };
                let key = self.others.keys().find(|key| same(key)).cloned();
                let key = key.with_context(|| format!("there is no {kind} {namespace}/{name}"))?;
                self.others.remove(&key);
            }
        }
        Ok(())
    }

    /// A namespace goes with all that is in it; its pods must be gone already.
    fn delete_namespace(&mut self, name: &str) -> Result<()> {
        self.namespaces
            .remove(name)
            .with_context(|| format!("there is no namespace {name}"))?;
        let services: Vec<_> = self
            .services
            .keys()
            .filter(|key| key.0 == name)
            .cloned()
            .collect();
        for key in services {
            self.delete("service", &format!("{}/{}", key.0, key.1))?;
        }
        self.service_accounts.retain(|key, _| key.0 != name);
        self.slices.retain(|key, _| key.0 != name);
        self.others.retain(|key, _| key.1 != name);
        Ok(())
    }

    /// Sets and removes labels of an object.
    pub(crate) fn label(
        &mut self,
        kind: &str,
        name: &str,
        labels: &BTreeMap<String, Option<String>>,
    ) -> Result<()> {
        let meta = match kind.to_ascii_lowercase().as_str() {
            "node" => self
                .nodes
                .get_mut(name)
                .map(|entry| &mut entry.object.metadata),
            "namespace" => self
                .namespaces
                .get_mut(name)
                .map(|object| &mut object.metadata),
            "pod" => {
                let key = self.find_pod(name)?;
                self.pods
                    .get_mut(&key)
                    .map(|entry| &mut entry.object.metadata)
            }
            "service" => {
                let key = find(&self.services, "service", name)?;
                self.services
                    .get_mut(&key)
                    .map(|object| &mut object.metadata)
            }
            "serviceaccount" => {
                let key = find(&self.service_accounts, "service account", name)?;
                self.service_accounts
                    .get_mut(&key)
                    .map(|object| &mut object.metadata)
            }
            _ => bail!("labels of a {kind} cannot be changed: apply it anew"),
        };
        let meta = meta.with_context(|| format!("there is no {kind} {name}"))?;
        let current = meta.labels.get_or_insert_default();
        for (key, value) in labels {
            match value {
                Some(value) => current.insert(key.clone(), value.clone()),
                None => current.remove(key),
            };
        }
        Ok(())
    }

    /// Whether a pod is opted in to the mesh.
    pub(crate) fn meshed(&self, entry: &PodEntry) -> bool {
        let namespace = entry
            .object
            .metadata
            .namespace
            .as_deref()
            .unwrap_or_default();
        pod::meshed(&entry.object, self.namespaces.get(namespace))
    }

    /// The endpoint slices of a service: the controller's, and those that were applied.
    fn slices_of(&self, key: &Key, service: &Service) -> Vec<EndpointSlice> {
        let zone = |node: &str| {
            let labels = self.nodes.get(node)?.object.metadata.labels.as_ref()?;
            labels.get(ZONE).cloned()
        };
        let mut slices = endpoints::slices(service, self.pods.values(), zone);
        let applied = self.slices.iter().filter(|(slice, object)| {
            let labels = object.metadata.labels.as_ref();
            slice.0 == key.0 && labels.and_then(|labels| labels.get(SERVICE_NAME)) == Some(&key.1)
        });
        slices.extend(applied.map(|(_, object)| object.clone()));
        slices
    }

    /// Everything that kube-proxy makes rules of.
    pub(crate) fn frontends(&self) -> Vec<Frontend> {
        let of = |(key, service): (&Key, &Service)| {
            let slices = self.slices_of(key, service);
            proxy::frontends(service, &slices.iter().collect::<Vec<_>>())
        };
        self.services.iter().flat_map(of).collect()
    }

    /// The addresses of a service's ready endpoints.
    pub(crate) fn ready_endpoints(&self, key: &Key, service: &Service) -> Vec<IpAddr> {
        let mut ips = Vec::new();
        for slice in self.slices_of(key, service) {
            for endpoint in slice.endpoints.into_iter().flatten() {
                if endpoint
                    .conditions
                    .as_ref()
                    .and_then(|c| c.ready)
                    .unwrap_or(true)
                {
                    ips.extend(
                        endpoint
                            .addresses
                            .iter()
                            .filter_map(|ip| ip.parse::<IpAddr>().ok()),
                    );
                }
            }
        }
        ips
    }

    /// The names that every pod knows.
    pub(crate) fn names(&self) -> Vec<Named> {
        let named = |(key, service): (&Key, &Service)| {
            let addresses = if service::headless(service) {
                self.ready_endpoints(key, service)
            } else {
                service::cluster_ips(service)
            };
            Named {
                namespace: key.0.clone(),
                name: key.1.clone(),
                addresses,
            }
        };
        self.services.iter().map(named).collect()
    }

    /// The files the daemons read, by name.
    pub(crate) fn files(&self) -> Result<BTreeMap<String, String>> {
        let mut files = BTreeMap::new();
        let mut add = |file: Result<(String, String)>| -> Result<()> {
            let (name, text) = file?;
            files.insert(name, text);
            Ok(())
        };
        for (name, entry) in &self.nodes {
            add(render::file(
                "Node",
                "",
                name,
                &render::node(&entry.object, entry.index),
            ))?;
        }
        for (name, namespace) in &self.namespaces {
            add(render::file("Namespace", "", name, namespace))?;
        }
        for ((namespace, name), account) in &self.service_accounts {
            add(render::file("ServiceAccount", namespace, name, account))?;
        }
        for ((namespace, name), entry) in &self.pods {
            add(render::file("Pod", namespace, name, &render::pod(entry)))?;
        }
        for (key, service) in &self.services {
            add(render::file("Service", &key.0, &key.1, service))?;
            for slice in endpoints::slices(service, self.pods.values(), |node| self.zone(node)) {
                let name = slice.metadata.name.clone().unwrap_or_default();
                add(render::file("EndpointSlice", &key.0, &name, &slice))?;
            }
        }
        for ((namespace, name), slice) in &self.slices {
            add(render::file("EndpointSlice", namespace, name, slice))?;
        }
        for ((kind, namespace, name), value) in &self.others {
            add(render::file(kind, namespace, name, value))?;
        }
        Ok(files)
    }

    fn zone(&self, node: &str) -> Option<String> {
        self.nodes
            .get(node)?
            .object
            .metadata
            .labels
            .as_ref()?
            .get(ZONE)
            .cloned()
    }
}

impl PodEntry {
    /// Only what may change of a running pod: labels and annotations.
    fn update(&mut self, new: Pod) -> Result<()> {
        if self.deleting.is_some() {
            bail!("it is terminating");
        }
        let mut spec = new.spec.unwrap_or_default();
        spec.node_name.get_or_insert_with(|| self.node.clone());
        if self.object.spec.as_ref() != Some(&spec) {
            bail!("the spec of a running pod cannot change: delete it first");
        }
        self.object.metadata.labels = new.metadata.labels;
        self.object.metadata.annotations = new.metadata.annotations;
        Ok(())
    }
}

/// The pod's addresses: those it asks for, and for the other families of its node's pools.
fn addresses(meta: &ObjectMeta, pools: &mut [Pool; 2], owner: &str) -> Result<Vec<IpAddr>> {
    let (families, fixed) = (pod::families(meta)?, pod::fixed_ips(meta)?);
    let mut ips: Vec<IpAddr> = Vec::new();
    for pool in pools
        .iter_mut()
        .filter(|pool| families.contains(&pool.family()))
    {
        let got = match fixed.iter().find(|ip| pool.family().has(**ip)) {
            Some(ip) => pool.claim(*ip, owner).map(|()| *ip),
            None => pool.allocate(owner),
        };
        match got {
            Ok(ip) => ips.push(ip),
            Err(error) => {
                ips.iter()
                    .for_each(|ip| pools.iter_mut().for_each(|pool| pool.release(*ip)));
                return Err(error);
            }
        }
    }
    if let Some(ip) = fixed
        .iter()
        .find(|ip| !families.contains(&Family::of(**ip)))
    {
        bail!("address {ip} is not of the pod's IP families");
    }
    Ok(ips)
}

fn find<T>(objects: &BTreeMap<Key, T>, what: &str, name: &str) -> Result<Key> {
    let mut found = objects.keys().filter(|key| match name.split_once('/') {
        Some((namespace, name)) => key.0 == namespace && key.1 == name,
        None => key.1 == name,
    });
    match (found.next(), found.next()) {
        (Some(key), None) => Ok(key.clone()),
        (Some(a), Some(b)) => bail!(
            "{what} {name} is ambiguous: say {}/{name} or {}/{name}",
            a.0,
            b.0
        ),
        (None, _) => bail!("there is no {what} {name}"),
    }
}

fn other_key(value: &Value) -> (String, String, String) {
    let text = |pointer: &str| {
        value
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    (
        text("/kind"),
        text("/metadata/namespace"),
        text("/metadata/name"),
    )
}

#[cfg(test)]
mod tests;
