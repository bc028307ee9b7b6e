//! Publishes the state of the lab: object files, hosts files, kube-proxy rules, status.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use futures_util::future::try_join_all;
use k8s_openapi::api::core::v1::Service;

use super::{Agent, LabContext, ca};
use crate::model::Key;
use crate::model::cluster::NodeEntry;
use crate::model::hosts;
use crate::model::kube_proxy;
use crate::model::pod::PodEntry;
use crate::model::service;
use crate::model::topology;
use crate::protocol::{CaStatus, NodeStatus, PodStatus, ProgramState, ServiceStatus, Status};
use crate::registry::LabDir;
use crate::tools::run_async;

/// What was published last, to find the differences.
#[derive(Debug, Default)]
pub(super) struct Published {
    objects: BTreeMap<String, String>,
    /// The hosts file of each network namespace.
    hosts: BTreeMap<String, String>,
    /// The kube-proxy rules of each node.
    rules: BTreeMap<String, String>,
}

impl Agent {
    /// Publishes the current state. Files, rules and status that have not changed are not written.
    pub(super) async fn publish(&mut self) -> Result<()> {
        self.publish_hosts()?;
        self.publish_rules().await?;
        self.publish_objects()?;
        for (key, desired) in &self.pods {
            if let Some(entry) = self.cluster.pods.get(key) {
                let meshed = self.cluster.meshed(entry);
                desired.send_if_modified(|state| {
                    std::mem::replace(&mut state.meshed, meshed) != meshed
                });
            }
        }
        let current = self.current_status();
        self.status.send_if_modified(|status| {
            let is_same = Status {
                generation: status.generation,
                ..current.clone()
            } == *status;
            if !is_same {
                *status = Status {
                    generation: status.generation + 1,
                    ..current
                };
            }
            !is_same
        });
        Ok(())
    }

    fn publish_objects(&mut self) -> Result<()> {
        let dir = &self.context.dir;
        let files = self.cluster.files()?;
        for (name, text) in &files {
            if self.published.objects.get(name) != Some(text) {
                write_atomically(dir, &dir.objects().join(name), text.as_bytes())?;
            }
        }
        for name in self
            .published
            .objects
            .keys()
            .filter(|name| !files.contains_key(*name))
        {
            let _ = fs::remove_file(dir.objects().join(name));
        }
        self.published.objects = files;
        Ok(())
    }

    fn publish_hosts(&mut self) -> Result<()> {
        let services = self.cluster.service_addresses();
        let mut files = BTreeMap::new();
        for (name, node) in &self.cluster.nodes {
            let own = topology::node_addresses(node.index);
            files.insert(
                node.netns.clone(),
                hosts::text(None, (name, &own), &services),
            );
        }
        for (key, entry) in self
            .cluster
            .pods
            .iter()
            .filter(|(_, entry)| !entry.host_network())
        {
            files.insert(
                entry.netns.clone(),
                hosts::text(Some(&key.0), (&key.1, &entry.ips), &services),
            );
        }
        for (netns, text) in &files {
            match self.published.hosts.get(netns) {
                None => create_etc(&self.context.dir, netns, text)?,
                Some(old) if old != text => {
                    write_in_place(&LabDir::etc(netns).join("hosts"), text)?;
                }
                Some(_) => {}
            }
        }
        for netns in self
            .published
            .hosts
            .keys()
            .filter(|netns| !files.contains_key(*netns))
        {
            let _ = fs::remove_dir_all(LabDir::etc(netns));
        }
        self.published.hosts = files;
        Ok(())
    }

    async fn publish_rules(&mut self) -> Result<()> {
        let rules = kube_proxy::ruleset(&self.cluster.frontends());
        let outdated = self
            .cluster
            .nodes
            .iter()
            .filter(|(name, _)| self.published.rules.get(*name) != Some(&rules));
        let load = outdated.map(async |(name, node)| {
            let nft = ["ip", "netns", "exec", &node.netns, "nft", "-f", "-"];
            run_async(&nft, &rules)
                .await
                .with_context(|| format!("kube-proxy of node {name}"))?;
            anyhow::Ok(name.clone())
        });
        for name in try_join_all(load).await? {
            self.published.rules.insert(name, rules.clone());
        }
        Ok(())
    }

    fn current_status(&self) -> Status {
        let node = |(name, node): (&String, &NodeEntry)| {
            let daemon = self.daemons.get(name);
            NodeStatus {
                name: name.clone(),
                netns: node.netns.clone(),
                addresses: topology::node_addresses(node.index).to_vec(),
                daemon: daemon.map_or(ProgramState::Disabled, |daemon| daemon.state.clone()),
                daemon_pid: daemon.and_then(|daemon| daemon.pid),
            }
        };
        let service = |(key, service): (&Key, &Service)| ServiceStatus {
            namespace: key.0.clone(),
            name: key.1.clone(),
            cluster_ips: service::cluster_ips(service),
            endpoints: self.cluster.ready_endpoints(key, service),
        };
        let ca = self.ca.as_ref().map(|ca| CaStatus {
            address: ca::address(),
            state: ca.state.clone(),
            pid: ca.pid,
        });
        Status {
            ca,
            nodes: self.cluster.nodes.iter().map(node).collect(),
            pods: self
                .cluster
                .pods
                .iter()
                .map(|(key, entry)| self.pod_status(key, entry))
                .collect(),
            services: self.cluster.services.iter().map(service).collect(),
            ..empty_status(&self.context)
        }
    }

    fn pod_status(&self, key: &Key, entry: &PodEntry) -> PodStatus {
        let phase = match entry.deleting {
            Some(_) => "Terminating",
            None => entry.status.phase.name(),
        };
        PodStatus {
            namespace: key.0.clone(),
            name: key.1.clone(),
            uid: entry.uid.clone(),
            node: entry.node.clone(),
            netns: entry.netns.clone(),
            ips: entry.ips.clone(),
            phase: phase.to_owned(),
            ready: entry.status.ready,
            meshed: self.cluster.meshed(entry),
            restarts: entry.status.restarts,
            message: entry.status.message.clone(),
        }
    }
}

/// The status of an empty lab.
pub(super) fn empty_status(context: &LabContext) -> Status {
    Status {
        generation: 0,
        name: context.dir.name().to_owned(),
        dir: context.dir.root().to_owned(),
        fabric: context.fabric.clone(),
        nodes: Vec::new(),
        ca: None,
        pods: Vec::new(),
        services: Vec::new(),
    }
}

/// Writes a staged file and renames it into place: a reader sees the old file or the new one.
pub(super) fn write_atomically(dir: &LabDir, path: &Path, bytes: &[u8]) -> Result<()> {
    let staged = dir.staging().join("next");
    fs::write(&staged, bytes)
        .and_then(|()| fs::rename(&staged, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The files that `ip netns exec` mounts over those in `/etc`.
fn create_etc(dir: &LabDir, netns: &str, text: &str) -> Result<()> {
    dir.register(netns)?;
    let etc = LabDir::etc(netns);
    let mut files = vec![("hosts", text)];
    // A file that does not exist cannot be mounted over. Without resolv.conf, resolvers query the
    // local host, as with this one.
    if Path::new("/etc/resolv.conf").exists() {
        files.push(("resolv.conf", hosts::RESOLV_CONF));
    }
    let write = || {
        fs::create_dir_all(&etc)?;
        files
            .iter()
            .try_for_each(|(name, text)| fs::write(etc.join(name), text))
    };
    write().with_context(|| format!("cannot write {}", etc.display()))
}

/// Changes a file in place: running processes have this inode mounted. The new text is one write,
/// so a reader never sees an empty file.
fn write_in_place(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let file = OpenOptions::new().write(true).open(path)?;
        file.write_all_at(text.as_bytes(), 0)?;
        file.set_len(text.len() as u64)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
