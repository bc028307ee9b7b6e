//! Network namespaces by name.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::poll;

/// Where `ip netns` keeps them.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

pub(crate) fn exists(name: &str) -> bool {
    path(name).exists()
}

/// Runs `work` on a thread that is inside the namespace. The thread ends with the work, so that no
/// thread that someone uses again is ever in the wrong place.
pub(crate) fn inside<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    let file = File::open(path(name)).with_context(|| format!("no network namespace {name}"))?;
    let entered = std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> nix::Result<T> {
            setns(&file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        });
        thread
            .join()
            .map_err(|_| anyhow!("a thread in {name} panicked"))
    })?;
    entered.with_context(|| format!("cannot enter {name}"))
}

/// [`inside`], for callers that must not block.
pub(crate) async fn inside_async<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (done, answer) = tokio::sync::oneshot::channel();
    let name = name.to_owned();
    std::thread::spawn(move || done.send(inside(&name, work)));
    answer.await.context("a thread in a namespace panicked")?
}

/// Sets sysctls (`net/ipv4/ip_forward`) of the namespace.
pub(crate) fn sysctls(name: &str, settings: &[(&str, &str)]) -> Result<()> {
    inside(name, || {
        settings.iter().try_for_each(|(key, value)| {
            fs::write(Path::new("/proc/sys").join(key), value)
                .with_context(|| format!("sysctl {key}"))
        })
    })?
}

/// Network namespaces that are held open, so that their identity is theirs for as long as this
/// lives, also when their names are gone.
#[derive(Debug)]
pub(crate) struct Held {
    files: Vec<File>,
}

impl Held {
    /// Those of these that exist.
    pub(crate) fn open(names: &[&str]) -> Self {
        Self {
            files: names
                .iter()
                .filter_map(|name| File::open(path(name)).ok())
                .collect(),
        }
    }

    /// Kills every process in these namespaces and waits until they are gone. A process that is
    /// being forked meanwhile is met in the next round.
    pub(crate) fn kill_all(&self, within: Duration) -> Result<()> {
        let mut alive = Vec::new();
        let gone = poll::until(within, poll::OFTEN, || {
            alive = match self.processes() {
                Ok(alive) => alive,
                Err(error) => return Some(Err(error)),
            };
            for pid in &alive {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            alive.is_empty().then_some(Ok(()))
        });
        gone.unwrap_or_else(|| Err(anyhow!("processes {alive:?} do not end")))
    }

    fn processes(&self) -> Result<Vec<Pid>> {
        let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let own: HashSet<(u64, u64)> = self
            .files
            .iter()
            .filter_map(|file| file.metadata().ok())
            .map(identity)
            .collect();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").context("/proc")?.flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let netns = fs::metadata(entry.path().join("ns/net")).map(identity);
            if netns.is_ok_and(|netns| own.contains(&netns)) {
                found.push(Pid::from_raw(pid));
            }
        }
        Ok(found)
    }
}
