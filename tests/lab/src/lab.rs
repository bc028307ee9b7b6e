//! The library's face: a lab that lives as long as its value.

mod addresses;
mod authority;
mod daemons;
mod wait;

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::capture::{Capture, Location};
use crate::client::{Client, launch};
use crate::model::manifest;
use crate::options::Options;
use crate::process::{self, Output, Process};
use crate::protocol::{ExecInfo, Request, Status};
use crate::registry::{self, LabDir};

/// No command of a test runs longer, unless it says so with [`Lab::exec_in`].
const EXEC_DEADLINE: Duration = Duration::from_secs(30);

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
    /// The agent takes the end of the connection for the end of the lab.
    owner: Option<(UnixStream, Child)>,
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
        let (dir, agent) = launch(&name, &options)?;
        let owner = Client::new(&dir).own()?;
        let lab = Self::over(dir, Some((owner, agent)), options.ready_deadline)?;
        lab.apply(yaml)?;
        if options.wait_until_ready {
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

    fn over(
        dir: LabDir,
        owner: Option<(UnixStream, Child)>,
        ready_deadline: Duration,
    ) -> Result<Self> {
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
    pub fn delete_pod_with_grace(&self, name: &str, grace: Duration) -> Result<()> {
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

    /// Runs a program in a pod, as `kubectl exec` does, for at most 30 s.
    ///
    /// # Errors
    /// There is no such pod, or the program still runs at the deadline. An exit code is no error.
    pub fn exec(&self, pod: &str, cmd: &[&str]) -> Result<Output> {
        self.exec_in(&Location::Pod(pod.to_owned()), cmd, EXEC_DEADLINE)
    }

    /// Runs a program in a pod, a node or the fabric (which is outside the cluster), bounded.
    ///
    /// # Errors
    /// There is no such place, or the program still runs at the deadline.
    pub fn exec_in(&self, place: &Location, cmd: &[&str], within: Duration) -> Result<Output> {
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
        self.spawn_in(&Location::Pod(pod.to_owned()), cmd)
    }

    /// Starts a program in a pod, a node or the fabric.
    ///
    /// # Errors
    /// There is no such place.
    pub fn spawn_in(&self, place: &Location, cmd: &[&str]) -> Result<Process> {
        Process::start(process::command(&self.exec_info(place)?, cmd))
    }

    pub(crate) fn exec_info(&self, place: &Location) -> Result<ExecInfo> {
        if let Location::Pod(pod) = place {
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
    pub fn netns(&self, place: &Location) -> Result<String> {
        Ok(match place {
            Location::Fabric => self.fabric.clone(),
            Location::Node(node) => self.status()?.node(node)?.netns.clone(),
            Location::Pod(pod) => self.status()?.pod(pod)?.netns.clone(),
        })
    }

    /// Records the packets of a place until the capture is dropped. `filter` is tcpdump's; empty
    /// takes everything. When this returns, packets are being recorded.
    ///
    /// # Errors
    /// There is no such place, or tcpdump refuses.
    pub fn capture(&self, place: Location, filter: &str) -> Result<Capture> {
        Capture::start(self.netns(&place)?, place, filter)
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
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let owner = self.owner.take();
        registry::take_down(&self.dir)?;
        match owner {
            // It has let go of the lab, which is the last thing that it does.
            Some((_, mut agent)) => agent.wait().map(drop).context("the lab's agent"),
            None => Ok(()),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owner.is_some()
            && let Err(error) = self.end()
        {
            eprintln!("lab {}: {error:#}", self.dir.name());
        }
    }
}

fn made_up_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "t{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}
