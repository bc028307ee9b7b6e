//! Acting on requests and reports.

use std::collections::BTreeSet;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::sync::watch;

use super::event::{Answer, Event};
use super::kubelet::{self, Wish};
use super::program::Program;
use super::{Agent, authority, daemon, sandbox};
use crate::model::Key;
use crate::model::cluster::Created;
use crate::model::manifest;
use crate::model::render;
use crate::options::IdentitySource;
use crate::protocol::{DaemonAction, ExecInfo, Request};

/// The grace period of a pod that does not name one. Kubernetes' 30 s would make every test of a
/// program that ignores SIGTERM that long.
const GRACE_SECONDS: u64 = 2;

/// A deletion that is answered when these pods are gone.
pub(super) struct Deletion {
    pods: BTreeSet<Key>,
    /// The object that goes after them.
    then: Option<(String, String)>,
    answer: Answer,
}

impl Agent {
    pub(super) async fn act(&mut self, event: Event) {
        match event {
            Event::Request(request, answer) => self.request(request, answer).await,
            Event::Pod { key, uid, progress } => {
                // A report of an earlier pod of this name may still be under way.
                if let Some(entry) = self
                    .cluster
                    .pods
                    .get_mut(&key)
                    .filter(|entry| entry.uid == uid)
                {
                    entry.progress = progress;
                }
            }
            Event::PodGone { key, uid } => {
                if self
                    .cluster
                    .pods
                    .get(&key)
                    .is_some_and(|entry| entry.uid == uid)
                {
                    self.cluster.remove_pod(&key);
                    self.pods.remove(&key);
                }
                self.answer_deletions().await;
            }
            Event::Program {
                program,
                state,
                pid,
            } => {
                let handle = match program {
                    Program::Daemon { node, .. } => self.daemons.get_mut(&node),
                    Program::Ca => self.ca.as_mut(),
                };
                if let Some(handle) = handle {
                    handle.report(state, pid);
                }
            }
            // The loop has acted on these.
            Event::Down(_) | Event::OwnerGone => {}
        }
    }

    async fn request(&mut self, request: Request, answer: Answer) {
        let result = match request {
            Request::Delete { kind, name, grace } => {
                return self.delete(kind, name, grace, answer).await;
            }
            Request::Daemon { node, action } => return self.program(Some(&node), action, answer),
            Request::Ca { action } => return self.program(None, action, answer),
            Request::SetLaunchOptions { node, launch } => self
                .handle(node.as_deref())
                .map(|handle| handle.launch = launch),
            Request::Apply { yaml } => self.apply(&yaml).await,
            Request::Label { kind, name, labels } => self.cluster.label(&kind, &name, &labels),
            Request::Exec { pod } => {
                let info = self
                    .exec(&pod)
                    .and_then(|info| Ok(serde_json::to_value(info)?));
                let _ = answer.send(info.map_err(|error| format!("{error:#}")));
                return;
            }
            Request::Keep => {
                self.keep = true;
                Ok(())
            }
            // The connection has answered these.
            Request::Status { .. } | Request::Own | Request::Down => Ok(()),
        };
        // What was accepted is published before it is answered, so that who asks next sees it.
        let result = match result {
            Ok(()) => self.publish().await,
            error => error,
        };
        reply(answer, result);
    }

    /// All of a manifest or nothing of it.
    async fn apply(&mut self, yaml: &str) -> Result<()> {
        let mut changed = self.cluster.clone();
        let mut created = Created::default();
        for object in manifest::parse(yaml)? {
            changed.put(object, &new_uid, &mut created)?;
        }
        self.cluster = changed;
        for node in &created.nodes {
            sandbox::node(&self.world, &self.cluster, node)
                .await
                .with_context(|| format!("node {node}"))?;
        }
        // Hosts files and rules are there before the first process that may use them.
        self.publish().await?;
        for node in created.nodes {
            self.add_daemon(&node).await?;
        }
        for key in created.pods {
            let Some(entry) = self.cluster.pods.get(&key) else {
                continue;
            };
            let wish = Wish {
                meshed: self.cluster.meshed(entry),
                delete: None,
            };
            let (sender, wishes) = watch::channel(wish);
            let node_netns = self
                .cluster
                .nodes
                .get(&entry.node)
                .map(|node| node.netns.clone());
            let pod = kubelet::Pod::new(
                &self.world,
                key.clone(),
                entry,
                node_netns.unwrap_or_default(),
            );
            self.pods.insert(key, sender);
            self.tasks.spawn_local(pod.run(wishes));
        }
        Ok(())
    }

    async fn delete(&mut self, kind: String, name: String, grace: Option<u64>, answer: Answer) {
        let pods = match self.doomed(&kind, &name) {
            Ok(pods) => pods,
            Err(error) => return reply(answer, Err(error)),
        };
        for key in &pods {
            let own = self
                .cluster
                .pods
                .get(key)
                .and_then(|pod| pod.spec().termination_grace_period_seconds);
            let grace = grace
                .or(own.and_then(|own| own.try_into().ok()))
                .unwrap_or(GRACE_SECONDS);
            self.cluster.terminate(key, grace, render::now());
            // Endpoints first: by the time the processes hear of it, nobody is sent to them.
            if let Err(error) = self.publish().await {
                eprintln!("publish: {error:#}");
            }
            if let Some(wishes) = self.pods.get(key) {
                wishes.send_modify(|wish| wish.delete = Some(grace));
            }
        }
        let then = (!kind.eq_ignore_ascii_case("pod")).then_some((kind, name));
        self.deletions.push(Deletion {
            pods: pods.into_iter().collect(),
            then,
            answer,
        });
        self.answer_deletions().await;
    }

    /// The pods that a deletion takes with it.
    fn doomed(&self, kind: &str, name: &str) -> Result<Vec<Key>> {
        Ok(match kind.to_ascii_lowercase().as_str() {
            "pod" => vec![self.cluster.find_pod(name)?],
            "namespace" => self
                .cluster
                .pods
                .keys()
                .filter(|key| key.0 == name)
                .cloned()
                .collect(),
            _ => Vec::new(),
        })
    }

    async fn answer_deletions(&mut self) {
        let alive = &self.cluster.pods;
        let done =
            |deletion: &mut Deletion| !deletion.pods.iter().any(|key| alive.contains_key(key));
        let done: Vec<Deletion> = self.deletions.extract_if(.., done).collect();
        for Deletion { then, answer, .. } in done {
            let deleted = match then {
                Some((kind, name)) => self.cluster.delete(&kind, &name),
                None => Ok(()),
            };
            let result = match deleted {
                Ok(()) => self.publish().await,
                error => error,
            };
            reply(answer, result);
        }
    }

    /// The daemon of a node, or without a node the certificate authority.
    fn handle(&mut self, node: Option<&str>) -> Result<&mut daemon::Handle> {
        let Some(node) = node else {
            return self
                .ca
                .as_mut()
                .context("this lab runs without a certificate authority");
        };
        if !self.cluster.nodes.contains_key(node) {
            bail!("there is no node {node}");
        }
        self.daemons
            .get_mut(node)
            .context("this lab runs without daemons")
    }

    fn program(&mut self, node: Option<&str>, action: DaemonAction, answer: Answer) {
        let handle = match self.handle(node) {
            Ok(handle) => handle,
            Err(error) => return reply(answer, Err(error)),
        };
        match action {
            DaemonAction::Start => {
                if let Some(task) = handle.start() {
                    self.tasks.spawn_local(task);
                }
                reply(answer, Ok(()));
            }
            DaemonAction::Kill | DaemonAction::Stop => handle.end(action, answer),
        }
    }

    /// Starts the daemon of a new node, if the lab runs with daemons.
    async fn add_daemon(&mut self, node: &str) -> Result<()> {
        let (world, options) = (&self.world, &self.world.options);
        if world.daemon.is_none() {
            return Ok(());
        }
        if options.identity == IdentitySource::Ca {
            authority::mint(world, node).await?;
        }
        let netns = self.cluster.nodes.get(node).map(|node| node.netns.clone());
        let program = Program::Daemon {
            node: node.to_owned(),
            netns: netns.unwrap_or_default(),
        };
        let launch = options.node_launch.get(node).cloned().unwrap_or_default();
        let mut daemon = daemon::Handle::new(Rc::clone(world), program, launch);
        if let Some(task) = daemon.start() {
            self.tasks.spawn_local(task);
        }
        self.daemons.insert(node.to_owned(), daemon);
        Ok(())
    }

    fn exec(&self, name: &str) -> Result<ExecInfo> {
        let entry = &self.cluster.pods[&self.cluster.find_pod(name)?];
        let dir = self.world.dir.pod_dir(&entry.uid);
        let env = entry.environment(entry.spec().containers.first(), &dir.to_string_lossy());
        Ok(ExecInfo {
            netns: entry.netns.clone(),
            env,
            dir,
        })
    }
}

/// Answers once; whoever asked may have gone.
pub(super) fn reply(answer: Answer, result: Result<()>) {
    let _ = answer.send(
        result
            .map(|()| Value::Null)
            .map_err(|error| format!("{error:#}")),
    );
}

fn new_uid() -> String {
    // The kernel makes a random one for every reader.
    let uid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    uid.trim().to_owned()
}
