//! Network namespaces by name: entering them, their sysctls, their processes.

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

/// The file that `ip netns` keeps for a namespace.
pub(crate) fn path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

pub(crate) fn exists(name: &str) -> bool {
    path(name).exists()
}

/// Runs `work` on a new thread in the namespace. The thread ends with the work, so no thread that is
/// used again is ever in the wrong namespace.
pub(crate) fn run_in<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
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

/// [`run_in`], for callers that must not block.
pub(crate) async fn run_in_async<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (sender, result) = tokio::sync::oneshot::channel();
    let name = name.to_owned();
    std::thread::spawn(move || sender.send(run_in(&name, work)));
    result.await.context("a thread in a namespace panicked")?
}

/// Sets sysctls (`net/ipv4/ip_forward`) of the namespace.
pub(crate) fn set_sysctls(name: &str, settings: &[(&str, &str)]) -> Result<()> {
    run_in(name, || {
        settings.iter().try_for_each(|(key, value)| {
            fs::write(Path::new("/proc/sys").join(key), value)
                .with_context(|| format!("sysctl {key}"))
        })
    })?
}

/// Network namespaces that are held open: their inode numbers are not reused, even after their
/// names are deleted.
#[derive(Debug)]
pub(crate) struct OpenNamespaces {
    files: Vec<File>,
}

impl OpenNamespaces {
    /// Opens those of these namespaces that exist.
    pub(crate) fn open(names: &[&str]) -> Self {
        Self {
            files: names
                .iter()
                .filter_map(|name| File::open(path(name)).ok())
                .collect(),
        }
    }

    /// Kills every process in these namespaces and waits until all have exited. A child that is
    /// forked meanwhile is killed in the next round.
    pub(crate) fn kill_all(&self, timeout: Duration) -> Result<()> {
        let mut running = Vec::new();
        let done = poll::until(timeout, poll::FAST_INTERVAL, || {
            running = match self.processes() {
                Ok(running) => running,
                Err(error) => return Some(Err(error)),
            };
            for pid in &running {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            running.is_empty().then_some(Ok(()))
        });
        done.unwrap_or_else(|| Err(anyhow!("processes {running:?} do not exit after SIGKILL")))
    }

    fn processes(&self) -> Result<Vec<Pid>> {
        let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let namespaces: HashSet<(u64, u64)> = self
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
            if netns.is_ok_and(|netns| namespaces.contains(&netns)) {
                found.push(Pid::from_raw(pid));
            }
        }
        Ok(found)
    }
}
