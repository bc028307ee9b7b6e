//! Which labs there are on this machine, and how to remove what a dead one left.
//!
//! A lab is a folder in `/run/ambit-lab`. Its agent holds a lock on a file in it for as long as it
//! lives, and writes the name of each network namespace down before it creates it. So a lab whose
//! lock can be taken is dead, and its folder says what is left of it; nothing needs guessing from
//! names, and no process id is trusted.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Client;
use crate::netns;
use crate::poll;
use crate::protocol::Request;
use crate::tools;

const BASE: &str = "/run/ambit-lab";

/// Where `ip netns exec` looks for files to mount over those in `/etc`.
const ETC_NETNS: &str = "/etc/netns";

/// A killed process is gone within milliseconds; one that is stuck in the kernel stays.
const KILL_DEADLINE: Duration = Duration::from_secs(3);

/// How long an agent that was told to go may take before it is killed.
const AGENT_DEADLINE: Duration = Duration::from_secs(10);

/// The folder of one lab, and what is where in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LabDir {
    name: String,
    root: PathBuf,
}

impl LabDir {
    /// # Errors
    /// The name is not fit to be part of a file name and of a namespace's name.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let fit = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > 24 || !name.chars().all(fit) {
            bail!("{name:?} is no name for a lab: 1 to 24 of a-z, 0-9 and -");
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

    /// Files are written here and renamed into place, so that no reader sees half of one.
    pub(crate) fn staging(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(crate) fn netns_dir(&self) -> PathBuf {
        self.root.join("netns")
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.root.join("ca")
    }

    /// All roots that the authority hands out; while roots are replaced, it shows a certificate of the
    /// old one for a while.
    pub(crate) fn ca_bundle(&self) -> PathBuf {
        self.ca().join("state").join("root-bundle.pem")
    }

    /// What the nodes' tokens are signed and checked with, and one token for each node.
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

    /// A pod's own folder: its working directory and its TMPDIR.
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

    /// The names of the network namespaces that were or will be created, one per line.
    fn namespaces(&self) -> PathBuf {
        self.root.join("namespaces")
    }

    /// Writes a namespace's name down, to be called before the namespace exists.
    pub(crate) fn register(&self, netns: &str) -> Result<()> {
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.namespaces())?;
        writeln!(file, "{netns}").context("cannot register a namespace")
    }

    /// The folder whose files `ip netns exec` mounts over those in `/etc`.
    pub(crate) fn etc(netns: &str) -> PathBuf {
        Path::new(ETC_NETNS).join(netns)
    }
}

/// Removes what dead labs have left and takes the name. The returned file is the lock, which the
/// agent is to hold.
pub(crate) fn claim(name: &str) -> Result<(LabDir, File)> {
    let dir = LabDir::new(name)?;
    let _base = lock_base()?;
    sweep_all()?;
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
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let lock = File::create_new(dir.lock()).context("lock")?;
    lock.try_lock().context("the lock of a new lab is taken")?;
    Ok((dir, lock))
}

/// Removes what labs have left whose agent is dead; says their names.
///
/// # Errors
/// Not root, or something of them cannot be removed.
pub fn remove_dead_labs() -> Result<Vec<String>> {
    let _base = lock_base()?;
    sweep_all()
}

/// Every lab of this machine, alive or not.
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

/// Held while labs are swept and names are claimed, so that a lab that is just being made is not
/// taken for a dead one.
fn lock_base() -> Result<File> {
    fs::create_dir_all(BASE).with_context(|| format!("cannot make {BASE} (root?)"))?;
    let lock =
        File::create(Path::new(BASE).join(".lock")).context("cannot lock the labs (root?)")?;
    lock.lock().context("cannot lock the labs")?;
    Ok(lock)
}

fn sweep_all() -> Result<Vec<String>> {
    let mut swept = Vec::new();
    for dir in all()? {
        if dead(&dir) {
            wipe(&dir)
                .with_context(|| format!("cannot remove what is left of lab {}", dir.name))?;
            swept.push(dir.name);
        }
    }
    tidy()?;
    Ok(swept)
}

/// Removes the folder that labs share once there is no lab; it fails, as it should, if somebody
/// else has files there. Called with the base locked, so no lab begins meanwhile.
fn tidy() -> Result<()> {
    if all()?.is_empty() {
        let _ = fs::remove_dir(ETC_NETNS);
    }
    Ok(())
}

fn dead(dir: &LabDir) -> bool {
    match File::open(dir.lock()) {
        Ok(lock) => lock.try_lock().is_ok(),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Tells the agent to go, and removes what it could not.
pub(crate) fn take_down(dir: &LabDir) -> Result<()> {
    // An agent that has died, or dies of this, is what the rest is for.
    let _ = Client::new(dir).ask(&Request::Down);
    let _base = lock_base()?;
    let ended = || (!dir.root.exists() || dead(dir)).then_some(());
    if poll::until(AGENT_DEADLINE, poll::OFTEN, ended).is_none() {
        kill_agent(dir);
        poll::until(KILL_DEADLINE, poll::OFTEN, ended)
            .with_context(|| format!("lab {}: its agent does not end", dir.name))?;
    }
    wipe(dir)?;
    tidy()
}

/// The agent's process id is written into the file it locks; so it is right while the lock is held.
fn kill_agent(dir: &LabDir) {
    let pid = fs::read_to_string(dir.lock())
        .ok()
        .and_then(|text| text.trim().parse().ok());
    if let Some(pid) = pid {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Removes everything that a lab has made: processes, namespaces (and with them interfaces, rules
/// and routes), files.
pub(crate) fn wipe(dir: &LabDir) -> Result<()> {
    let registered = fs::read_to_string(dir.namespaces()).unwrap_or_default();
    let names: HashSet<&str> = registered.lines().filter(|line| !line.is_empty()).collect();
    let existing: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| netns::exists(name))
        .collect();
    let held = netns::Held::open(&existing);
    held.kill_all(KILL_DEADLINE)?;
    let batch: String = existing
        .iter()
        .map(|name| format!("netns del {name}\n"))
        .collect();
    if !batch.is_empty() {
        tools::run(&["ip", "-force", "-batch", "-"], &batch)?;
    }
    // A program that was on its way in when the others were killed; no more can follow.
    held.kill_all(KILL_DEADLINE)?;
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
    fn a_name_cannot_leave_the_folder_or_be_an_option() {
        for name in ["", "..", "a/b", "A", "a b", &"x".repeat(25)] {
            assert!(LabDir::new(name).is_err(), "{name:?}");
        }
        assert_eq!(
            LabDir::new("t1-0").unwrap().root(),
            Path::new("/run/ambit-lab/t1-0")
        );
    }
}
