//! Network namespaces by name.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

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

/// The processes in any of these namespaces.
fn processes(names: &[&str]) -> Result<Vec<Pid>> {
    let inodes: HashSet<(u64, u64)> = names
        .iter()
        .filter_map(|name| identity(&path(name)).ok())
        .collect();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        let Ok(entry) = entry else { continue };
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if identity(&entry.path().join("ns/net")).is_ok_and(|id| inodes.contains(&id)) {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Kills every process in these namespaces and waits until they are gone. A process that is being
/// forked meanwhile is met in the next round.
pub(crate) fn kill_all(names: &[&str], within: Duration) -> Result<()> {
    let deadline = Instant::now() + within;
    loop {
        let alive = processes(names)?;
        if alive.is_empty() {
            return Ok(());
        }
        for pid in &alive {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        if Instant::now() >= deadline {
            bail!("processes {alive:?} do not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
