//! The objects of the cluster, and the rules by which they come and go.

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
use super::ipam::Pool;
use super::manifest::{self, Object};
use super::pod::{self, PodEntry, Progress};
use super::render;
use super::schedule::{Candidate, schedule};
use super::service;
use super::topology;
use crate::options::IpFamily;

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
        .find(|ip| !families.contains(&IpFamily::of(**ip)))
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
