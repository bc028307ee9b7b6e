//! Making the world agree with the state: files, names, rules, status.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

use super::{Agent, World, authority};
use crate::model::hosts;
use crate::model::proxy;
use crate::model::service;
use crate::model::topology;
use crate::protocol::{CaStatus, NodeStatus, PodStatus, ProgramState, ServiceStatus, Status};
use crate::registry::LabDir;
use crate::tools::run_async;

/// What was published last.
#[derive(Debug, Default)]
pub(super) struct Published {
    objects: BTreeMap<String, String>,
    /// The hosts file of each network namespace.
    hosts: BTreeMap<String, String>,
    /// The rules of each node.
    rules: BTreeMap<String, String>,
}

impl Agent {
    /// Brings files, names, rules and status up to date; what has not changed is not touched.
    pub(super) async fn publish(&mut self) -> Result<()> {
        self.publish_hosts()?;
        self.publish_rules().await?;
        self.publish_objects()?;
        for (key, wishes) in &self.pods {
            if let Some(entry) = self.cluster.pods.get(key) {
                let meshed = self.cluster.meshed(entry);
                wishes
                    .send_if_modified(|wish| std::mem::replace(&mut wish.meshed, meshed) != meshed);
            }
        }
        let fresh = self.current_status();
        self.status.send_if_modified(|status| {
            let same = Status {
                generation: status.generation,
                ..fresh.clone()
            } == *status;
            if !same {
                *status = Status {
                    generation: status.generation + 1,
                    ..fresh
                };
            }
            !same
        });
        Ok(())
    }

    fn publish_objects(&mut self) -> Result<()> {
        let dir = &self.world.dir;
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
        let names = self.cluster.names();
        let mut files = BTreeMap::new();
        for (name, node) in &self.cluster.nodes {
            let own = topology::node_addresses(node.index);
            files.insert(node.netns.clone(), hosts::text(None, (name, &own), &names));
        }
        for (key, entry) in self
            .cluster
            .pods
            .iter()
            .filter(|(_, entry)| !entry.host_network())
        {
            files.insert(
                entry.netns.clone(),
                hosts::text(Some(&key.0), (&key.1, &entry.ips), &names),
            );
        }
        for (netns, text) in &files {
            match self.published.hosts.get(netns) {
                None => create_etc(&self.world.dir, netns, text)?,
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
        let rules = proxy::ruleset(&self.cluster.frontends());
        for (name, node) in &self.cluster.nodes {
            if self.published.rules.get(name) != Some(&rules) {
                let nft = ["ip", "netns", "exec", &node.netns, "nft", "-f", "-"];
                run_async(&nft, &rules)
                    .await
                    .with_context(|| format!("kube-proxy of node {name}"))?;
                self.published.rules.insert(name.clone(), rules.clone());
            }
        }
        Ok(())
    }

    fn current_status(&self) -> Status {
        let node = |(name, node): (&String, &crate::model::cluster::NodeEntry)| {
            let daemon = self.daemons.get(name);
            NodeStatus {
                name: name.clone(),
                netns: node.netns.clone(),
                addresses: topology::node_addresses(node.index).to_vec(),
                daemon: daemon.map_or(ProgramState::Disabled, |daemon| daemon.state.clone()),
                daemon_pid: daemon.and_then(|daemon| daemon.pid),
            }
        };
        let service =
            |(key, service): (&crate::model::Key, &k8s_openapi::api::core::v1::Service)| {
                ServiceStatus {
                    namespace: key.0.clone(),
                    name: key.1.clone(),
                    cluster_ips: service::cluster_ips(service),
                    endpoints: self.cluster.ready_endpoints(key, service),
                }
            };
        let ca = self.ca.as_ref().map(|ca| CaStatus {
            address: authority::address(),
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
            ..empty_status(&self.world)
        }
    }

    fn pod_status(
        &self,
        key: &crate::model::Key,
        entry: &crate::model::pod::PodEntry,
    ) -> PodStatus {
        let phase = match entry.deleting {
            Some(_) => "Terminating",
            None => entry.progress.phase.name(),
        };
        PodStatus {
            namespace: key.0.clone(),
            name: key.1.clone(),
            uid: entry.uid.clone(),
            node: entry.node.clone(),
            netns: entry.netns.clone(),
            ips: entry.ips.clone(),
            phase: phase.to_owned(),
            ready: entry.progress.ready,
            meshed: self.cluster.meshed(entry),
            restarts: entry.progress.restarts,
            message: entry.progress.message.clone(),
        }
    }
}

/// The status of a lab with nothing in it.
pub(super) fn empty_status(world: &World) -> Status {
    Status {
        generation: 0,
        name: world.dir.name().to_owned(),
        dir: world.dir.root().to_owned(),
        fabric: world.fabric.clone(),
        nodes: Vec::new(),
        ca: None,
        pods: Vec::new(),
        services: Vec::new(),
    }
}

/// Writes beside and renames into place: a reader sees the old file or the new one.
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
    // Only what exists can be mounted over; without the file a resolver asks the local host, too.
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

/// Processes have this very file mounted, so it is changed, not replaced; the new text goes in with
/// one write, and a reader never finds the file empty.
fn write_in_place(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let file = OpenOptions::new().write(true).open(path)?;
        file.write_all_at(text.as_bytes(), 0)?;
        file.set_len(text.len() as u64)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
