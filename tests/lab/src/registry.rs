//! Which labs exist on this machine, and removal of what a orphaned lab left behind.
//!
//! A lab is a folder in `/run/ambit-lab`. Its agent holds a lock on a file in the folder until it
//! exits, and registers the name of each network namespace before it creates the namespace. A lab
//! whose lock is free is orphaned, and its folder lists what it left. Neither names nor process ids
//! have to be guessed.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns;
use crate::tools;

const BASE: &str = "/run/ambit-lab";

/// The folder in which `ip netns exec` finds the files that it mounts over those in `/etc`.
const ETC_NETNS: &str = "/etc/netns";

/// A killed process exits within milliseconds, unless it is blocked in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);

/// The folder of one lab and the paths in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LabDir {
    name: String,
    root: PathBuf,
}

impl LabDir {
    /// # Errors
    /// The name cannot be part of a file name and of a namespace's name.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 24 || !name.chars().all(is_allowed) {
            bail!("{name:?} is not a valid lab name: use 1 to 24 of a-z, 0-9 and -");
        }
        Ok(Self {
            name: name.to_owned(),
            root: Path::new(BASE).join(name),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.root.join("agent.sock")
    }

    /// The resolved Kubernetes objects, one per file.
    pub(crate) fn objects(&self) -> PathBuf {
        self.root.join("objects")
    }

    /// Files are written here and renamed into place, so that no reader sees a partial file.
    pub(crate) fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(crate) fn netns_dir(&self) -> PathBuf {
        self.root.join("netns")
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.root.join("ca")
    }

    /// All roots that the certificate authority hands out. During a root replacement it still serves
    /// with a certificate of the old root for a while.
    pub(crate) fn ca_bundle(&self) -> PathBuf {
        self.ca().join("state").join("root-bundle.pem")
    }

    /// The key pair of the nodes' tokens, and one token per node.
    pub(crate) fn tokens(&self) -> PathBuf {
        self.root.join("tokens")
    }

    pub(crate) fn token_key(&self) -> PathBuf {
        self.tokens().join("key.pem")
    }

    pub(crate) fn token_public_key(&self) -> PathBuf {
        self.tokens().join("public.pem")
    }

    pub(crate) fn token(&self, node: &str) -> PathBuf {
        self.tokens().join(node)
    }

    /// A pod's folder: its working directory and its TMPDIR.
    pub(crate) fn pod_dir(&self, uid: &str) -> PathBuf {
        self.root.join("pods").join(uid)
    }

    fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    pub(crate) fn agent_log(&self) -> PathBuf {
        self.logs().join("agent.log")
    }

    pub(crate) fn ca_log(&self) -> PathBuf {
        self.logs().join("ca.log")
    }

    pub(crate) fn node_log(&self, node: &str) -> PathBuf {
        self.logs().join(format!("node_{node}.log"))
    }

    pub(crate) fn pod_log(&self, namespace: &str, name: &str) -> PathBuf {
        self.logs().join(format!("pod_{namespace}_{name}.log"))
    }

    /// The file of registered network namespaces, one name per line.
    fn namespaces(&self) -> PathBuf {
        self.root.join("namespaces")
    }

    /// Registers a namespace's name. Call this before the namespace is created.
    pub(crate) fn register(&self, netns: &str) -> Result<()> {
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.namespaces())?;
        writeln!(file, "{netns}").context("cannot register a namespace")
    }

    /// The folder whose files `ip netns exec` mounts over those in `/etc` in this namespace.
    pub(crate) fn etc(netns: &str) -> PathBuf {
        Path::new(ETC_NETNS).join(netns)
    }

    /// Whether no agent holds the lock.
    pub(crate) fn is_orphaned(&self) -> bool {
        match File::open(self.lock()) {
            Ok(lock) => lock.try_lock().is_ok(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }
}

/// Removes orphaned labs and claims the name. The returned file is the lock, which the agent must hold.
pub(crate) fn claim(name: &str) -> Result<(LabDir, File)> {
    let dir = LabDir::new(name)?;
    let _base = lock_base()?;
    remove_orphaned()?;
    if dir.root.exists() {
        bail!("lab {name} is up already; `lab down --name {name}` takes it down");
    }
    for folder in [
        dir.objects(),
        dir.staging(),
        dir.netns_dir(),
        dir.ca(),
        dir.tokens(),
        dir.logs(),
    ] {
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let lock = File::create_new(dir.lock()).context("lock")?;
    lock.try_lock().context("the lock of a new lab is taken")?;
    Ok((dir, lock))
}

/// Removes the labs whose agent has exited. Returns their names.
///
/// # Errors
/// The caller is not root, or something cannot be removed.
pub fn remove_orphaned_labs() -> Result<Vec<String>> {
    let _base = lock_base()?;
    remove_orphaned()
}

/// Every lab on this machine, running or orphaned.
pub(crate) fn all() -> Result<Vec<LabDir>> {
    let entries = match fs::read_dir(BASE) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context(BASE),
    };
    let mut labs = Vec::new();
    for entry in entries {
        let entry = entry.context(BASE)?;
        if entry.path().is_dir() {
            labs.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|name| LabDir::new(name).ok()),
            );
        }
    }
    labs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(labs)
}

/// The lock of the registry. It is held while orphaned labs are removed and while a name is claimed, so
/// that a lab whose agent is not yet started is not removed as orphaned.
pub(crate) fn lock_base() -> Result<File> {
    fs::create_dir_all(BASE).with_context(|| format!("cannot create {BASE} (root?)"))?;
    let lock =
        File::create(Path::new(BASE).join(".lock")).context("cannot lock the labs (root?)")?;
    lock.lock().context("cannot lock the labs")?;
    Ok(lock)
}

fn remove_orphaned() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for dir in all()? {
        if dir.is_orphaned() {
            remove_all(&dir).with_context(|| format!("cannot remove orphaned lab {}", dir.name))?;
            removed.push(dir.name);
        }
    }
    remove_shared_folders()?;
    Ok(removed)
}

/// Removes the folder in `/etc` that labs share once there is no lab. It stays if it contains files
/// of another program. The caller holds the lock of the registry, so no lab starts meanwhile.
pub(crate) fn remove_shared_folders() -> Result<()> {
    if all()?.is_empty() {
        let _ = fs::remove_dir(ETC_NETNS);
    }
    Ok(())
}

/// Kills the agent. Its process id is in the file that it locks, and valid while the lock is held.
pub(crate) fn kill_agent(dir: &LabDir) {
    let pid = fs::read_to_string(dir.lock())
        .ok()
        .and_then(|text| text.trim().parse().ok());
    if let Some(pid) = pid {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Removes everything that a lab has created: processes, namespaces (with their interfaces, rules
/// and routes), files.
pub(crate) fn remove_all(dir: &LabDir) -> Result<()> {
    let registered = fs::read_to_string(dir.namespaces()).unwrap_or_default();
    let names: HashSet<&str> = registered.lines().filter(|line| !line.is_empty()).collect();
    let existing: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| netns::exists(name))
        .collect();
    let open = netns::OpenNamespaces::open(&existing);
    open.kill_all(KILL_TIMEOUT)?;
    let batch: String = existing
        .iter()
        .map(|name| format!("netns del {name}\n"))
        .collect();
    if !batch.is_empty() {
        tools::run(&["ip", "-force", "-batch", "-"], &batch)?;
    }
    // A process may have entered a namespace while the others were killed. No more can follow now.
    open.kill_all(KILL_TIMEOUT)?;
    for name in names {
        remove(&LabDir::etc(name))?;
    }
    remove(&dir.root)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_paths_or_not_lowercase_are_refused() {
        for name in ["", "..", "a/b", "A", "a b", &"x".repeat(25)] {
            assert!(LabDir::new(name).is_err(), "{name:?}");
        }
        assert_eq!(
            LabDir::new("t1-0").unwrap().root(),
            Path::new("/run/ambit-lab/t1-0")
        );
    }
}
