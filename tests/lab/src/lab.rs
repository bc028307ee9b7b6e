//! A handle to a running lab.

mod addresses;
mod ca;
mod daemons;
mod wait;

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::capture::Capture;
use crate::client::Client;
use crate::lifecycle;
use crate::location::Location;
use crate::model::manifest;
use crate::options::Options;
use crate::process::{self, Output, Process};
use crate::protocol::{ExecInfo, Request, Status};
use crate::registry::LabDir;

/// Timeout of [`Lab::exec`]; [`Lab::exec_in`] has its own.
const EXEC_TIMEOUT: Duration = Duration::from_secs(30);

/// Environment variable that keeps a lab when its test ends, to look into a failure.
const KEEP_VARIABLE: &str = "AMBIT_LAB_KEEP";

/// Manifests as text, or in a file or folder.
#[derive(Debug, Clone)]
pub enum Manifests {
    /// Multi-document YAML.
    Text(String),
    /// A YAML file, or a folder whose `*.yaml` and `*.yml` files are read.
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

/// A running lab.
///
/// Dropping the value removes the lab, also during a panic. The lab is removed as well when the
/// process that holds the value exits. Neither applies to a lab from [`Lab::attach`].
///
/// Pods are named `name`, or `namespace/name` where the name alone is ambiguous.
#[derive(Debug)]
pub struct Lab {
    client: Client,
    /// The owning connection and the agent. The agent removes the lab when the connection closes.
    owner: Option<(UnixStream, Child)>,
    dir: LabDir,
    fabric: String,
    ready_timeout: Duration,
}

impl Lab {
    /// Removes orphaned labs, brings a lab up and, unless the options disable it, waits until all
    /// daemons and pods are ready.
    ///
    /// # Errors
    /// The caller is not root, a tool is missing, a manifest is invalid, or something is not ready
    /// at the timeout; the error names what is not ready and why.
    pub fn up(manifests: impl Into<Manifests>, options: Options) -> Result<Self> {
        let yaml = manifests.into().text()?;
        let name = options.name.clone().unwrap_or_else(generated_name);
        let (dir, agent) = lifecycle::launch(&name, &options)?;
        let owner = Client::new(&dir).own()?;
        let lab = Self::connect(dir, Some((owner, agent)), options.ready_timeout)?;
        lab.apply(yaml)?;
        if options.wait_until_ready {
            lab.wait_ready()?;
        }
        Ok(lab)
    }

    /// Attaches to a running lab. Dropping the value leaves the lab running.
    ///
    /// # Errors
    /// There is no such lab, or its agent does not run.
    pub fn attach(name: &str) -> Result<Self> {
        let dir = LabDir::new(name)?;
        Self::connect(dir, None, Options::default().ready_timeout)
    }

    fn connect(
        dir: LabDir,
        owner: Option<(UnixStream, Child)>,
        ready_timeout: Duration,
    ) -> Result<Self> {
        let client = Client::new(&dir);
        let fabric = client.status(None, Duration::ZERO)?.fabric;
        Ok(Self {
            client,
            owner,
            dir,
            fabric,
            ready_timeout,
        })
    }

    /// Keeps the lab running after this value is dropped and this process exits.
    ///
    /// # Errors
    /// The agent does not respond.
    pub fn keep(mut self) -> Result<()> {
        self.disown()
    }

    fn disown(&mut self) -> Result<()> {
        if self.owner.is_some() {
            self.client.send(&Request::Keep)?;
            self.owner = None;
        }
        Ok(())
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        self.dir.name()
    }

    /// The current status of the lab.
    ///
    /// # Errors
    /// The agent does not respond.
    pub fn status(&self) -> Result<Status> {
        self.client.status(None, Duration::ZERO)
    }

    /// Creates or updates objects. Returns once they are accepted and written for the daemons to
    /// read, before pods are ready.
    ///
    /// # Errors
    /// A manifest is invalid; then nothing is applied. The error has the document, object and reason.
    pub fn apply(&self, manifests: impl Into<Manifests>) -> Result<()> {
        let yaml = manifests.into().text()?;
        self.client.send(&Request::Apply { yaml }).map(drop)
    }

    /// Deletes an object (`Pod`, `shop/web`) and waits until it is removed, as `kubectl delete` does.
    ///
    /// # Errors
    /// There is no such object.
    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        let (kind, name) = (kind.to_owned(), name.to_owned());
        self.client
            .send(&Request::Delete {
                kind,
                name,
                grace: None,
            })
            .map(drop)
    }

    /// Deletes a pod with this grace period instead of its own. Zero kills it at once.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn delete_pod_with_grace(&self, name: &str, grace: Duration) -> Result<()> {
        let (kind, name) = ("Pod".to_owned(), name.to_owned());
        let grace = Some(grace.as_secs());
        self.client
            .send(&Request::Delete { kind, name, grace })
            .map(drop)
    }

    /// Sets (`Some`) and removes (`None`) labels of an object.
    ///
    /// # Errors
    /// There is no such object.
    pub fn label(&self, kind: &str, name: &str, labels: &[(&str, Option<&str>)]) -> Result<()> {
        let to_owned =
            |(key, value): &(&str, Option<&str>)| ((*key).to_owned(), value.map(str::to_owned));
        let labels: BTreeMap<_, _> = labels.iter().map(to_owned).collect();
        let (kind, name) = (kind.to_owned(), name.to_owned());
        self.client
            .send(&Request::Label { kind, name, labels })
            .map(drop)
    }

    /// Runs a program in a pod, as `kubectl exec` does, for at most 30 s.
    ///
    /// # Errors
    /// There is no such pod, or the program still runs after 30 s. A non-zero exit code is not an
    /// error.
    pub fn exec(&self, pod: &str, cmd: &[&str]) -> Result<Output> {
        self.exec_in(&Location::Pod(pod.to_owned()), cmd, EXEC_TIMEOUT)
    }

    /// Runs a program in a location, with an empty stdin and a timeout.
    ///
    /// # Errors
    /// There is no such location, or the program still runs at the timeout.
    pub fn exec_in(&self, location: &Location, cmd: &[&str], timeout: Duration) -> Result<Output> {
        let mut process = self.spawn_in(location, cmd)?;
        process.close_stdin();
        process
            .wait(timeout)
            .with_context(|| format!("{} in {location}", cmd.join(" ")))
    }

    /// Starts a program in a pod. Dropping the handle kills it.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn spawn(&self, pod: &str, cmd: &[&str]) -> Result<Process> {
        self.spawn_in(&Location::Pod(pod.to_owned()), cmd)
    }

    /// Starts a program in a location. Dropping the handle kills it.
    ///
    /// # Errors
    /// There is no such location.
    pub fn spawn_in(&self, location: &Location, cmd: &[&str]) -> Result<Process> {
        Process::start(process::command(&self.exec_info(location)?, cmd))
    }

    pub(crate) fn exec_info(&self, location: &Location) -> Result<ExecInfo> {
        if let Location::Pod(pod) = location {
            let info = self.client.send(&Request::Exec { pod: pod.clone() })?;
            return serde_json::from_value(info).context("the agent's response");
        }
        let (env, dir) = (BTreeMap::new(), PathBuf::new());
        Ok(ExecInfo {
            netns: self.netns(location)?,
            env,
            dir,
        })
    }

    /// The network namespace of a location: a name for `ip netns`, a file in `/run/netns`.
    ///
    /// # Errors
    /// There is no such location.
    pub fn netns(&self, location: &Location) -> Result<String> {
        Ok(match location {
            Location::Fabric => self.fabric.clone(),
            Location::Node(node) => self.status()?.node(node)?.netns.clone(),
            Location::Pod(pod) => self.status()?.pod(pod)?.netns.clone(),
        })
    }

    /// Captures the packets of a location until the capture is dropped. `filter` is a tcpdump
    /// filter; empty captures everything. When this returns, the capture is running.
    ///
    /// # Errors
    /// There is no such location, or tcpdump fails.
    pub fn capture(&self, location: Location, filter: &str) -> Result<Capture> {
        Capture::start(self.netns(&location)?, location, filter)
    }

    /// The folder of Kubernetes objects that the daemons read. A test may add files of its own,
    /// invalid ones too: the lab changes only files that it has written.
    pub fn source_folder(&self) -> PathBuf {
        self.dir.objects()
    }

    /// The folder of the lab's certificate authority.
    pub fn ca_folder(&self) -> PathBuf {
        self.dir.ca()
    }

    /// The folder with one file per pod, named by pod uid, that has the path of its network namespace.
    pub fn netns_folder(&self) -> PathBuf {
        self.dir.netns_dir()
    }

    /// Removes the lab. Unlike dropping the value, this returns errors.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn down(mut self) -> Result<()> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<()> {
        let owner = self.owner.take();
        lifecycle::take_down(&self.dir)?;
        match owner {
            // The agent has released the lock, which is the last thing before it exits.
            Some((_, mut agent)) => agent.wait().map(drop).context("the lab's agent"),
            None => Ok(()),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owner.is_none() {
            return;
        }
        let name = self.dir.name().to_owned();
        let result = if std::env::var_os(KEEP_VARIABLE).is_some() {
            eprintln!("lab {name} is kept: lab --name {name} status");
            self.disown()
        } else {
            self.take_down()
        };
        if let Err(error) = result {
            eprintln!("lab {name}: {error:#}");
        }
    }
}

fn generated_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "t{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}
