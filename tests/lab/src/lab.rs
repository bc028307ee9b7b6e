//! The library's face: a lab that lives as long as its value.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::capture::{Capture, Where};
use crate::client::{Client, launch};
use crate::http;
use crate::model::manifest;
use crate::netns;
use crate::options::{Family, Options};
use crate::poll;
use crate::process::{self, Output, Process};
use crate::protocol::{DaemonAction, DaemonState, ExecInfo, Request, Status};
use crate::registry::{self, LabDir};
use crate::settled;

/// No command of a test runs longer, unless it says so with [`Lab::exec_within`].
const EXEC_DEADLINE: Duration = Duration::from_secs(30);

/// How long the daemon's admin and metrics ports may take to answer.
const HTTP_DEADLINE: Duration = Duration::from_secs(5);

/// How often [`Lab::wait_until`] looks again at a condition that has no event.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Where manifests come from: text, or a folder or file.
#[derive(Debug, Clone)]
pub enum Manifests {
    /// Multi-document YAML.
    Text(String),
    /// A YAML file, or a folder of which every `*.yaml` and `*.yml` is read.
    Path(PathBuf),
}

impl From<&str> for Manifests {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Manifests {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&String> for Manifests {
    fn from(text: &String) -> Self {
        Self::Text(text.clone())
    }
}

impl From<&Path> for Manifests {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<PathBuf> for Manifests {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

impl Manifests {
    pub(crate) fn text(&self) -> Result<String> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::Path(path) => manifest::read(path),
        }
    }
}

/// A running lab. Dropping it, also in a panic, removes all of it; so does the death of the
/// process that holds it, unless it was attached to with [`Lab::attach`].
///
/// Pods are named `name`, or `namespace/name` where the name alone is ambiguous.
#[derive(Debug)]
pub struct Lab {
    client: Client,
    /// Held open: the agent takes its end for the end of the lab.
    owner: Option<UnixStream>,
    dir: LabDir,
    fabric: String,
    ready_deadline: Duration,
}

impl Lab {
    /// Sweeps what dead labs left, then brings a lab up and, unless the options say otherwise,
    /// waits until it has settled.
    ///
    /// # Errors
    /// Not root, a tool is missing, the manifests are refused, or the lab has not settled at the
    /// deadline; the error says what is not ready and why.
    pub fn up(manifests: impl Into<Manifests>, options: Options) -> Result<Self> {
        let yaml = manifests.into().text()?;
        let name = options.name.clone().unwrap_or_else(made_up_name);
        let dir = launch(&name, &options)?;
        let owner = Client::new(&dir).own()?;
        let lab = Self::over(dir, Some(owner), options.ready_deadline)?;
        lab.apply(yaml)?;
        if options.wait {
            lab.wait_ready()?;
        }
        Ok(lab)
    }

    /// A lab that runs already, which dropping this value leaves running.
    ///
    /// # Errors
    /// There is no such lab, or its agent is dead.
    pub fn attach(name: &str) -> Result<Self> {
        let dir = LabDir::new(name)?;
        Self::over(dir, None, Options::default().ready_deadline)
    }

    fn over(dir: LabDir, owner: Option<UnixStream>, ready_deadline: Duration) -> Result<Self> {
        let client = Client::new(&dir);
        let fabric = client.status(None, Duration::ZERO)?.fabric;
        Ok(Self {
            client,
            owner,
            dir,
            fabric,
            ready_deadline,
        })
    }

    /// From now on the lab outlives this value.
    pub fn keep(mut self) -> Result<()> {
        if self.owner.is_some() {
            self.client.ask(&Request::Keep)?;
            self.owner = None;
        }
        Ok(())
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        self.dir.name()
    }

    /// Everything the agent knows, now.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn status(&self) -> Result<Status> {
        self.client.status(None, Duration::ZERO)
    }

    /// Creates or updates objects. Returns once they are accepted and written for the daemons to
    /// read, before pods are ready.
    ///
    /// # Errors
    /// A manifest is refused (then none of them is applied), with file, object and reason.
    pub fn apply(&self, manifests: impl Into<Manifests>) -> Result<()> {
        let yaml = manifests.into().text()?;
        self.client.ask(&Request::Apply { yaml }).map(drop)
    }

    /// Deletes an object (`Pod`, `shop/web`) as `kubectl delete` does: returns when it is gone.
    ///
    /// # Errors
    /// There is no such object.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        let (kind, name) = (kind.to_owned(), name.to_owned());
        self.client
            .ask(&Request::Delete {
                kind,
                name,
                grace: None,
            })
            .map(drop)
    }

    /// Deletes a pod with this grace period instead of its own; zero kills at once.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn delete_pod_within(&self, name: &str, grace: Duration) -> Result<()> {
        let (kind, name) = ("Pod".to_owned(), name.to_owned());
        let grace = Some(grace.as_secs());
        self.client
            .ask(&Request::Delete { kind, name, grace })
            .map(drop)
    }

    /// Sets (`Some`) and removes (`None`) labels of any object.
    ///
    /// # Errors
    /// There is no such object.
    pub fn label(&self, kind: &str, name: &str, labels: &[(&str, Option<&str>)]) -> Result<()> {
        let owned =
            |(key, value): &(&str, Option<&str>)| ((*key).to_owned(), value.map(str::to_owned));
        let labels: BTreeMap<_, _> = labels.iter().map(owned).collect();
        let (kind, name) = (kind.to_owned(), name.to_owned());
        self.client
            .ask(&Request::Label { kind, name, labels })
            .map(drop)
    }

    /// Waits until every daemon and every pod is ready, and every daemon knows of it: of each ready
    /// pod, its mode, and each service's endpoints.
    ///
    /// # Errors
    /// The deadline of [`Options::ready_deadline`] has passed, or a daemon is not running; says
    /// what is missing.
    pub fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + self.ready_deadline;
        let settled = |status: &Status| status.unsettled().is_empty() || dead(status).is_some();
        let status = self.wait_status("the lab to be ready", self.ready_deadline, settled)?;
        if let Some((node, how)) = dead(&status) {
            let log = self.daemon_log(node).unwrap_or_default();
            bail!(
                "node {node}: daemon {how}; it said last: {}",
                log.lines().last().unwrap_or("nothing")
            );
        }
        for node in status
            .nodes
            .iter()
            .filter(|node| node.daemon == DaemonState::Ready)
        {
            self.wait_caught_up(
                &node.name,
                deadline.saturating_duration_since(Instant::now()),
            )?;
        }
        Ok(())
    }

    /// Waits until the daemon of a node has taken in the state of the lab as it is now: after a
    /// label or an apply, say, whose effect on traffic is to be tested.
    ///
    /// # Errors
    /// It has not at the deadline; says what it lacks.
    pub fn wait_caught_up(&self, node: &str, within: Duration) -> Result<()> {
        let mut lacking = None;
        let caught_up = poll::until(within, LOOK_AGAIN, || {
            lacking = match (self.config_dump(node), self.status()) {
                (Ok(dump), Ok(status)) => settled::lacking(&dump, &status),
                (Err(error), _) | (_, Err(error)) => Some(format!("{error:#}")),
            };
            lacking.is_none().then_some(())
        });
        let lacking = lacking.unwrap_or_default();
        caught_up.with_context(|| format!("the daemon of node {node} is not up to date: {lacking}"))
    }

    /// Waits for a condition of the lab's status, without polling: the agent says when it changes.
    ///
    /// # Errors
    /// It does not hold at the deadline; the error says `what`, and what is unsettled.
    pub fn wait_status(
        &self,
        what: &str,
        within: Duration,
        condition: impl Fn(&Status) -> bool,
    ) -> Result<Status> {
        let deadline = Instant::now() + within;
        let mut status = self.status()?;
        while !condition(&status) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "waited {within:?} for {what}; {}",
                    status.unsettled().join("; ")
                );
            }
            status = self.client.status(Some(status.generation), left)?;
        }
        Ok(status)
    }

    /// Waits for a condition of the outside world that has no event: it is looked at again every
    /// 20 ms. Returns what the condition returned.
    ///
    /// # Errors
    /// It returned `None` until the deadline; says `what`.
    pub fn wait_until<T>(
        &self,
        what: &str,
        within: Duration,
        condition: impl FnMut() -> Option<T>,
    ) -> Result<T> {
        poll::until(within, LOOK_AGAIN, condition)
            .with_context(|| format!("waited {within:?} for {what}"))
    }

    /// Waits until the node's daemon reports this state (`enrolled`) of the pod, or with `None`
    /// until it reports nothing of it.
    ///
    /// # Errors
    /// It does not at the deadline.
    pub fn wait_workload_state(
        &self,
        pod: &str,
        state: Option<&str>,
        within: Duration,
    ) -> Result<()> {
        let status = self.status()?;
        let pod = status.pod(pod)?;
        let what = format!(
            "{}/{} to be {state:?} in its node's daemon",
            pod.namespace, pod.name
        );
        self.wait_until(&what, within, || {
            let dump = self.config_dump(&pod.node).ok()?;
            (http::workload_state(&dump, &pod.uid) == state).then_some(())
        })
    }

    /// The pod's address of this family.
    ///
    /// # Errors
    /// There is no such pod, or it has no such address.
    pub fn pod_ip(&self, pod: &str, family: Family) -> Result<IpAddr> {
        let status = self.status()?;
        status
            .pod(pod)?
            .ip(family)
            .with_context(|| format!("pod {pod} has no {family:?} address"))
    }

    /// The ClusterIP of this family of a service, `name` or `namespace/name`.
    ///
    /// # Errors
    /// There is no such service, or it has no such address.
    pub fn service_ip(&self, service: &str, family: Family) -> Result<IpAddr> {
        let (namespace, name) = service.split_once('/').unwrap_or(("", service));
        let status = self.status()?;
        let mut found = status
            .services
            .iter()
            .filter(|s| s.name == name && (namespace.is_empty() || s.namespace == namespace));
        let found = found
            .next()
            .with_context(|| format!("no service {service}"))?;
        let ip = found.cluster_ips.iter().copied().find(|ip| family.has(*ip));
        ip.with_context(|| format!("service {service} has no {family:?} ClusterIP"))
    }

    /// The node's own address of this family.
    ///
    /// # Errors
    /// There is no such node.
    pub fn node_ip(&self, node: &str, family: Family) -> Result<IpAddr> {
        let status = self.status()?;
        let ip = status
            .node(node)?
            .addresses
            .iter()
            .copied()
            .find(|ip| family.has(*ip));
        ip.with_context(|| format!("node {node} has no {family:?} address"))
    }

    /// Runs a program in a pod, as `kubectl exec` does, for at most 30 s.
    ///
    /// # Errors
    /// There is no such pod, or the program still runs at the deadline. An exit code is no error.
    pub fn exec(&self, pod: &str, cmd: &[&str]) -> Result<Output> {
        self.exec_within(&Where::Pod(pod.to_owned()), cmd, EXEC_DEADLINE)
    }

    /// Runs a program in a pod, a node or the fabric (which is outside the cluster), bounded.
    ///
    /// # Errors
    /// There is no such place, or the program still runs at the deadline.
    pub fn exec_within(&self, place: &Where, cmd: &[&str], within: Duration) -> Result<Output> {
        let mut process = self.spawn_in(place, cmd)?;
        process.close_stdin();
        process
            .wait(within)
            .with_context(|| format!("{} in {place}", cmd.join(" ")))
    }

    /// Starts a program in a pod; it is killed when the handle is dropped.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn spawn(&self, pod: &str, cmd: &[&str]) -> Result<Process> {
        self.spawn_in(&Where::Pod(pod.to_owned()), cmd)
    }

    /// Starts a program in a pod, a node or the fabric.
    ///
    /// # Errors
    /// There is no such place.
    pub fn spawn_in(&self, place: &Where, cmd: &[&str]) -> Result<Process> {
        Process::start(process::command(&self.exec_info(place)?, cmd))
    }

    pub(crate) fn exec_info(&self, place: &Where) -> Result<ExecInfo> {
        if let Where::Pod(pod) = place {
            let info = self.client.ask(&Request::Exec { pod: pod.clone() })?;
            return serde_json::from_value(info).context("the agent's answer");
        }
        let (env, dir) = (BTreeMap::new(), PathBuf::new());
        Ok(ExecInfo {
            netns: self.netns(place)?,
            env,
            dir,
        })
    }

    /// The network namespace of a place: a name for `ip netns`, a file in `/run/netns`.
    ///
    /// # Errors
    /// There is no such place.
    pub fn netns(&self, place: &Where) -> Result<String> {
        Ok(match place {
            Where::Bridge => self.fabric.clone(),
            Where::Node(node) => self.status()?.node(node)?.netns.clone(),
            Where::Pod(pod) => self.status()?.pod(pod)?.netns.clone(),
        })
    }

    /// Records the packets of a place until the capture is dropped. `filter` is tcpdump's; empty
    /// takes everything. When this returns, packets are being recorded.
    ///
    /// # Errors
    /// There is no such place, or tcpdump refuses.
    pub fn capture(&self, place: Where, filter: &str) -> Result<Capture> {
        Capture::start(self.netns(&place)?, place, filter)
    }

    /// Kills the node's daemon with SIGKILL; it stays dead until [`Self::restart_daemon`].
    ///
    /// # Errors
    /// There is no such node.
    pub fn kill_daemon(&self, node: &str) -> Result<()> {
        self.daemon(node, DaemonAction::Kill)
    }

    /// Sends SIGTERM to the node's daemon and waits for its exit. How it ended is in the node's
    /// [`DaemonState::Exited`].
    ///
    /// # Errors
    /// There is no such node, or it did not exit within its drain time.
    pub fn stop_daemon(&self, node: &str) -> Result<()> {
        self.daemon(node, DaemonAction::Stop)
    }

    /// Starts the node's daemon again, if it does not run, and waits until it is ready.
    ///
    /// # Errors
    /// It is not ready at the deadline.
    pub fn restart_daemon(&self, node: &str) -> Result<()> {
        self.daemon(node, DaemonAction::Start)?;
        let what = format!("the daemon of node {node} to be ready");
        let ready = |status: &Status| {
            status
                .node(node)
                .is_ok_and(|node| node.daemon == DaemonState::Ready)
        };
        self.wait_status(&what, self.ready_deadline, ready)
            .map(drop)
    }

    fn daemon(&self, node: &str, action: DaemonAction) -> Result<()> {
        self.client
            .ask(&Request::Daemon {
                node: node.to_owned(),
                action,
            })
            .map(drop)
    }

    /// What the node's daemon has logged, over all its lives.
    ///
    /// # Errors
    /// There is no such log.
    pub fn daemon_log(&self, node: &str) -> Result<String> {
        read_log(&self.dir.node_log(node))
    }

    /// What the pod's containers wrote to stdout and stderr.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn pod_log(&self, pod: &str) -> Result<String> {
        let status = self.status()?;
        let pod = status.pod(pod)?;
        read_log(&self.dir.pod_log(&pod.namespace, &pod.name))
    }

    /// The daemon's metrics, in Prometheus' text form.
    ///
    /// # Errors
    /// It does not answer 200.
    pub fn metrics(&self, node: &str) -> Result<String> {
        self.http(
            &Where::Node(node.to_owned()),
            ([127, 0, 0, 1], 15020).into(),
            "/metrics",
        )?
        .ok()
    }

    /// The daemon's configuration dump.
    ///
    /// # Errors
    /// It does not answer 200 and JSON.
    pub fn config_dump(&self, node: &str) -> Result<Value> {
        let place = Where::Node(node.to_owned());
        let text = self
            .http(&place, ([127, 0, 0, 1], 15000).into(), "/config_dump")?
            .ok()?;
        serde_json::from_str(&text).context("config_dump is not JSON")
    }

    /// A GET request from inside a place.
    ///
    /// # Errors
    /// No answer within 5 s.
    pub fn http(&self, place: &Where, to: SocketAddr, path: &str) -> Result<http::Answer> {
        let netns = self.netns(place)?;
        let get = || http::get(to, &to.to_string(), path, &[], HTTP_DEADLINE);
        netns::inside(&netns, get)?.with_context(|| format!("GET http://{to}{path} in {place}"))
    }

    /// The folder of Kubernetes objects that the daemons read; a test may write files of its own
    /// into it, broken ones too. The lab leaves files alone that it has not written.
    pub fn source_folder(&self) -> PathBuf {
        self.dir.objects()
    }

    /// The folder of the lab's certificate authority.
    pub fn ca_folder(&self) -> PathBuf {
        self.dir.ca()
    }

    /// The folder of files named by pod uid, each with the path of its network namespace.
    pub fn netns_folder(&self) -> PathBuf {
        self.dir.netns_dir()
    }

    /// Removes the lab and says whether that went well, which dropping it cannot.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn down(mut self) -> Result<()> {
        self.owner = None;
        registry::take_down(&self.dir)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owner.take().is_some()
            && let Err(error) = registry::take_down(&self.dir)
        {
            eprintln!("lab {}: {error:#}", self.dir.name());
        }
    }
}

/// A node whose daemon does not run, and how that ended.
fn dead(status: &Status) -> Option<(&str, &str)> {
    status.nodes.iter().find_map(|node| match &node.daemon {
        DaemonState::Exited(how) => Some((node.name.as_str(), how.as_str())),
        _ => None,
    })
}

fn made_up_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "t{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

fn read_log(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("no log {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
