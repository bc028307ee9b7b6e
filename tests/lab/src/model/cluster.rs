//! The objects of the cluster: creating and updating them, addresses and scheduling of pods.

mod change;
mod views;

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde_json::Value;

use super::Key;
use super::ipam::AddressPool;
use super::manifest::{self, Object};
use super::pod::{self, KubeletStatus, PodEntry};
use super::render;
use super::schedule::{Candidate, schedule};
use super::service;
use super::topology;
use crate::options::IpFamily;

/// A node with its index in the lab and the address pools of its pods.
#[derive(Debug, Clone)]
pub(crate) struct NodeEntry {
    pub(crate) object: Node,
    pub(crate) index: u8,
    pub(crate) netns: String,
    pools: [AddressPool; 2],
}

/// The nodes and pods that an apply creates, which the agent then starts.
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
    /// Objects of other kinds, by kind, namespace and name.
    others: BTreeMap<(String, String, String), Value>,
    service_pools: [AddressPool; 2],
    /// How many pods were scheduled without `spec.nodeName`, for round robin.
    scheduled: usize,
}

impl Cluster {
    /// A new cluster, with the namespaces that always exist.
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
            service_pools: topology::service_pools(),
            scheduled: 0,
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

    /// Creates or updates one object. `uid` generates the uid of a pod.
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

    /// Creates or updates a namespace, with its default service account.
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
        let old_ips = self
            .services
            .get(&key)
            .map(service::cluster_ips)
            .unwrap_or_default();
        let is_headless = service::is_headless(&service);
        let spec = service.spec.get_or_insert_default();
        if !old_ips.is_empty()
            && !is_headless
            && spec.cluster_ip.is_none()
            && spec.cluster_ips.is_none()
        {
            // A service keeps its addresses when it changes.
            spec.cluster_ip = old_ips.first().map(ToString::to_string);
            spec.cluster_ips = Some(old_ips.iter().map(ToString::to_string).collect());
        }
        self.release_service_ips(&old_ips);
        service::resolve(&mut service, &mut self.service_pools, &owner)
            .with_context(|| owner.clone())?;
        self.services.insert(key, service);
        Ok(())
    }

    fn release_service_ips(&mut self, ips: &[IpAddr]) {
        for ip in ips {
            self.service_pools
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
        let name = format!("Pod {}/{}", key.0, key.1);
        pod::validate(&pod).with_context(|| name.clone())?;
        self.set_service_account(&mut pod, &key)
            .with_context(|| name.clone())?;
        if let Some(entry) = self.pods.get_mut(&key) {
            return entry.update(pod).context(name);
        }
        let entry = self.create_pod(pod, &key, uid).context(name)?;
        self.pods.insert(key.clone(), entry);
        created.pods.push(key);
        Ok(())
    }

    /// Sets the default service account and checks that the account exists.
    fn set_service_account(&self, pod: &mut Pod, key: &Key) -> Result<()> {
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

    /// Schedules the pod and allocates its addresses.
    fn create_pod(
        &mut self,
        mut pod: Pod,
        key: &Key,
        uid: &dyn Fn() -> String,
    ) -> Result<PodEntry> {
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
        let node = schedule(spec, &candidates, self.scheduled)?.to_owned();
        if spec.node_name.is_none() {
            self.scheduled += 1;
        }
        spec.node_name = Some(node.clone());
        let entry = self
            .nodes
            .get_mut(&node)
            .context("the node does not exist")?;
        let node_ips = topology::node_addresses(entry.index).to_vec();
        let host_network = pod::host_network(&pod);
        let (netns, ips) = if host_network {
            (entry.netns.clone(), node_ips.clone())
        } else {
            let short_uid: String = uid
                .chars()
                .filter(char::is_ascii_alphanumeric)
                .take(8)
                .collect();
            let netns = format!("ambit-{}-pod-{}.{}-{short_uid}", self.lab, key.0, key.1);
            (
                netns,
                allocate_ips(
                    &pod.metadata,
                    &mut entry.pools,
                    &format!("pod {}/{}", key.0, key.1),
                )?,
            )
        };
        let status = KubeletStatus::default();
        Ok(PodEntry {
            object: pod,
            uid,
            node,
            netns,
            ips,
            node_ips,
            created,
            status,
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

    /// Removes a pod and frees its addresses.
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
}

impl PodEntry {
    /// Updates labels and annotations. Nothing else of a running pod can change.
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

/// Allocates a pod's addresses: the fixed ones, and for other families one of the node's pools.
fn allocate_ips(
    meta: &ObjectMeta,
    pools: &mut [AddressPool; 2],
    owner: &str,
) -> Result<Vec<IpAddr>> {
    let (families, fixed) = (pod::families(meta)?, pod::fixed_ips(meta)?);
    let mut ips: Vec<IpAddr> = Vec::new();
    for pool in pools
        .iter_mut()
        .filter(|pool| families.contains(&pool.family()))
    {
        let allocated = match fixed.iter().find(|ip| pool.family().contains(**ip)) {
            Some(ip) => pool.reserve(*ip, owner).map(|()| *ip),
            None => pool.allocate(owner),
        };
        match allocated {
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
        .find(|ip| !families.contains(&IpFamily::of(**ip)))
    {
        bail!("address {ip} is not of the pod's IP families");
    }
    Ok(ips)
}

/// The key of an object by `name` or `namespace/name`.
fn find<T>(objects: &BTreeMap<Key, T>, kind: &str, name: &str) -> Result<Key> {
    let mut found = objects.keys().filter(|key| match name.split_once('/') {
        Some((namespace, name)) => key.0 == namespace && key.1 == name,
        None => key.1 == name,
    });
    match (found.next(), found.next()) {
        (Some(key), None) => Ok(key.clone()),
        (Some(a), Some(b)) => bail!(
            "{kind} {name} is ambiguous: use {}/{name} or {}/{name}",
            a.0,
            b.0
        ),
        (None, _) => bail!("there is no {kind} {name}"),
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
