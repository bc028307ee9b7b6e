//! The agent's events (requests and reports of tasks) and their effect on the state of the lab.

use std::collections::BTreeSet;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::sync::{oneshot, watch};

use super::kubelet::{self, DesiredState};
use super::program::Program;
use super::supervisor::ProgramHandle;
use super::{Agent, ca, sandbox};
use crate::model::Key;
use crate::model::cluster::Created;
use crate::model::manifest;
use crate::model::pod::KubeletStatus;
use crate::model::render;
use crate::options::IdentitySource;
use crate::protocol::{ExecInfo, ProgramAction, ProgramState, Request};

/// The grace period of a pod without `terminationGracePeriodSeconds`. With Kubernetes' default of
/// 30 s, every test with a program that ignores SIGTERM would take that long.
const DEFAULT_GRACE_SECONDS: u64 = 2;

/// The channel for the response to a request.
pub(super) type ReplySender = oneshot::Sender<Result<Value, String>>;

/// An event of the agent's loop.
pub(super) enum Event {
    /// A request from the socket.
    Request(Request, ReplySender),
    /// The connection that owns the lab has closed.
    OwnerGone,
    /// A request to remove the lab.
    Down(ReplySender),
    /// The status of a pod has changed.
    Pod {
        key: Key,
        uid: String,
        status: KubeletStatus,
    },
    /// A pod's processes and its namespace are removed.
    PodRemoved { key: Key, uid: String },
    /// The state of a program has changed.
    Program {
        program: Program,
        state: ProgramState,
        pid: Option<u32>,
    },
}

/// A deletion that is completed when its pods are removed.
pub(super) struct PendingDeletion {
    pods: BTreeSet<Key>,
    /// Kind and name of the object that is deleted after the pods.
    object: Option<(String, String)>,
    reply: ReplySender,
}

impl Agent {
    /// Applies an event to the state. The caller publishes the result.
    pub(super) async fn handle_event(&mut self, event: Event) {
        match event {
            Event::Request(request, reply) => self.handle_request(request, reply).await,
            Event::Pod { key, uid, status } => {
                // The report may be of an earlier pod of this name.
                if let Some(entry) = self
                    .cluster
                    .pods
                    .get_mut(&key)
                    .filter(|entry| entry.uid == uid)
                {
                    entry.status = status;
                }
            }
            Event::PodRemoved { key, uid } => {
                if self
                    .cluster
                    .pods
                    .get(&key)
                    .is_some_and(|entry| entry.uid == uid)
                {
                    self.cluster.remove_pod(&key);
                    self.pods.remove(&key);
                }
                self.complete_deletions().await;
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
                    handle.set_state(state, pid);
                }
            }
            // The loop handles these.
            Event::Down(_) | Event::OwnerGone => {}
        }
    }

    async fn handle_request(&mut self, request: Request, reply: ReplySender) {
        let result = match request {
            Request::Delete { kind, name, grace } => {
                return self.delete(kind, name, grace, reply).await;
            }
            Request::Daemon { node, action } => {
                return self.control_program(Some(&node), action, reply);
            }
            Request::Ca { action } => return self.control_program(None, action, reply),
            Request::SetLaunchOptions { node, launch } => self
                .program(node.as_deref())
                .map(|program| program.launch = launch),
            Request::Apply { yaml } => self.apply(&yaml).await,
            Request::Label { kind, name, labels } => self.cluster.label(&kind, &name, &labels),
            Request::Exec { pod } => {
                let info = self
                    .exec_info(&pod)
                    .and_then(|info| Ok(serde_json::to_value(info)?));
                let _ = reply.send(info.map_err(|error| format!("{error:#}")));
                return;
            }
            Request::Keep => {
                self.is_kept = true;
                Ok(())
            }
            // The server handles these.
            Request::Status { .. } | Request::Own | Request::Down => Ok(()),
        };
        // Published before the reply, so that the next request of the client sees the result.
        let result = match result {
            Ok(()) => self.publish().await,
            error => error,
        };
        send_reply(reply, result);
    }

    /// Applies all objects of a manifest or none.
    async fn apply(&mut self, yaml: &str) -> Result<()> {
        let mut changed = self.cluster.clone();
        let mut created = Created::default();
        for object in manifest::parse(yaml)? {
            changed.put(object, &new_uid, &mut created)?;
        }
        self.cluster = changed;
        sandbox::create_nodes(&self.context, &self.cluster, &created.nodes).await?;
        self.finish_ca_folder().await?;
        // Hosts files and rules exist before the first process that may use them.
        self.publish().await?;
        for node in created.nodes {
            self.add_daemon(&node).await?;
        }
        for key in created.pods {
            self.start_pod(key);
        }
        Ok(())
    }

    /// Starts the task of a new pod.
    fn start_pod(&mut self, key: Key) {
        let Some(entry) = self.cluster.pods.get(&key) else {
            return;
        };
        let (sender, desired) = watch::channel(DesiredState {
            meshed: self.cluster.meshed(entry),
            deletion_grace: None,
        });
        let node = self.cluster.nodes.get(&entry.node);
        let node_netns = node.map(|node| node.netns.clone()).unwrap_or_default();
        let pod = kubelet::Pod::new(&self.context, key.clone(), entry, node_netns);
        self.pods.insert(key, sender);
        self.tasks.spawn_local(pod.run(desired));
    }

    async fn delete(&mut self, kind: String, name: String, grace: Option<u64>, reply: ReplySender) {
        let pods = match self.pods_of(&kind, &name) {
            Ok(pods) => pods,
            Err(error) => return send_reply(reply, Err(error)),
        };
        for key in &pods {
            self.terminate_pod(key, grace).await;
        }
        let object = (!kind.eq_ignore_ascii_case("pod")).then_some((kind, name));
        self.deletions.push(PendingDeletion {
            pods: pods.into_iter().collect(),
            object,
            reply,
        });
        self.complete_deletions().await;
    }

    /// The pods that a deletion of this object deletes.
    fn pods_of(&self, kind: &str, name: &str) -> Result<Vec<Key>> {
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

    async fn terminate_pod(&mut self, key: &Key, grace: Option<u64>) {
        let configured = self
            .cluster
            .pods
            .get(key)
            .and_then(|pod| pod.spec().termination_grace_period_seconds);
        let grace = grace
            .or(configured.and_then(|configured| configured.try_into().ok()))
            .unwrap_or(DEFAULT_GRACE_SECONDS);
        self.cluster.terminate(key, grace, render::now());
        // Endpoints first: no new connection goes to processes that have received SIGTERM.
        if let Err(error) = self.publish().await {
            eprintln!("publish: {error:#}");
        }
        if let Some(desired) = self.pods.get(key) {
            desired.send_modify(|state| state.deletion_grace = Some(grace));
        }
    }

    async fn complete_deletions(&mut self) {
        let existing = &self.cluster.pods;
        let is_complete = |deletion: &mut PendingDeletion| {
            !deletion.pods.iter().any(|key| existing.contains_key(key))
        };
        let complete: Vec<PendingDeletion> = self.deletions.extract_if(.., is_complete).collect();
        for PendingDeletion { object, reply, .. } in complete {
            let deleted = match object {
                Some((kind, name)) => self.cluster.delete(&kind, &name),
                None => Ok(()),
            };
            let result = match deleted {
                Ok(()) => self.publish().await,
                error => error,
            };
            send_reply(reply, result);
        }
    }

    /// The daemon of a node, or without a node the certificate authority.
    fn program(&mut self, node: Option<&str>) -> Result<&mut ProgramHandle> {
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

    fn control_program(&mut self, node: Option<&str>, action: ProgramAction, reply: ReplySender) {
        let program = match self.program(node) {
            Ok(program) => program,
            Err(error) => return send_reply(reply, Err(error)),
        };
        match action {
            ProgramAction::Start => {
                if let Some(task) = program.start() {
                    self.tasks.spawn_local(task);
                }
                send_reply(reply, Ok(()));
            }
            ProgramAction::Kill | ProgramAction::Stop => program.stop(action, reply),
        }
    }

    /// Starts the daemon of a new node, if the lab runs with daemons.
    async fn add_daemon(&mut self, node: &str) -> Result<()> {
        let context = &self.context;
        if context.daemon.is_none() {
            return Ok(());
        }
        if context.options.identity == IdentitySource::Ca {
            ca::sign_token(context, node).await?;
        }
        let netns = self.cluster.nodes.get(node).map(|node| node.netns.clone());
        let program = Program::Daemon {
            node: node.to_owned(),
            netns: netns.unwrap_or_default(),
        };
        let launch = context
            .options
            .node_launch
            .get(node)
            .cloned()
            .unwrap_or_default();
        let mut daemon = ProgramHandle::new(Rc::clone(context), program, launch);
        if let Some(task) = daemon.start() {
            self.tasks.spawn_local(task);
        }
        self.daemons.insert(node.to_owned(), daemon);
        Ok(())
    }

    fn exec_info(&self, name: &str) -> Result<ExecInfo> {
        let entry = &self.cluster.pods[&self.cluster.find_pod(name)?];
        let dir = self.context.dir.pod_dir(&entry.uid);
        let env = entry.environment(entry.spec().containers.first(), &dir.to_string_lossy());
        Ok(ExecInfo {
            netns: entry.netns.clone(),
            env,
            dir,
        })
    }
}

/// Sends the response to a request. The client may have disconnected.
pub(super) fn send_reply(reply: ReplySender, result: Result<()>) {
    let _ = reply.send(
        result
            .map(|()| Value::Null)
            .map_err(|error| format!("{error:#}")),
    );
}

fn new_uid() -> String {
    // The kernel generates a random uuid for every read.
    let uid = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
    uid.trim().to_owned()
}
