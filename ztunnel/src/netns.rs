//! How network namespaces are opened, identified and entered, and the threads for slow work inside
//! them.
//!
//! A thread that stayed in one pod's namespace would open the next pod's sockets there. Therefore
//! [`Netns::enter`] aborts the process if it cannot restore the thread's own namespace.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::fstat;
use nix::sys::statfs::{FsType, fstatfs};
use tokio::sync::{mpsc, oneshot};

/// Magic number of `nsfs`, the file system of which every namespace is an inode (`NSFS_MAGIC` in
/// `linux/magic.h`).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// Identity of a network namespace. The kernel reuses the inode only after the last reference to
/// the namespace is closed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

impl fmt::Debug for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An open network namespace. The namespace exists at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    file: File,
    id: NetnsId,
    path: PathBuf,
}

thread_local! {
    /// This thread's own namespace: the one that it was in when it first entered another.
    static ORIGIN: OnceCell<File> = const { OnceCell::new() };
}

impl Netns {
    /// Opens the namespace at `path`: a bind mount or a link under `/proc`.
    ///
    /// # Errors
    /// Fails if `path` cannot be opened. Fails with `NotFound` if it is an ordinary file, which is
    /// what remains when the namespace's bind mount is gone.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{} is not a namespace", path.display()),
            ));
        }
        let stat = fstat(&file)?;
        Ok(Self {
            file,
            id: NetnsId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
            path: path.to_owned(),
        })
    }

    /// Opens the namespace of the calling thread.
    ///
    /// # Errors
    /// Fails if `/proc` is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Identity of the namespace.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Path by which it was opened, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Addresses of the namespace's devices, without loopback and IPv6 link-local ones, which every
    /// namespace has. They show which pod the namespace belongs to.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered.
    pub fn addresses(&self) -> io::Result<BTreeSet<IpAddr>> {
        self.enter(|| {
            Ok(getifaddrs()?
                .filter_map(|interface| global_ip(&interface))
                .filter(|ip| !ip.is_loopback())
                .collect())
        })
    }

    /// Runs `f` on this thread inside the namespace, then restores the thread's own namespace. A
    /// socket stays in the namespace in which it was opened. `f` must not wait for other threads,
    /// and must not call `enter`.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered (needs `CAP_SYS_ADMIN`), or with the error of `f`.
    ///
    /// Aborts the process if the thread's own namespace cannot be restored.
    pub fn enter<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        with_origin(|origin| {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            // Restores on drop, because `f` may panic.
            let _restore = RestoreNetns(origin);
            f()
        })
    }
}

/// Calls `f` with this thread's own namespace, which is opened by the first call and stays open.
fn with_origin<T>(f: impl FnOnce(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
    ORIGIN.with(|origin| {
        if origin.get().is_none() {
            let file = File::open("/proc/thread-self/ns/net")?;
            origin.get_or_init(|| file);
        }
        let Some(origin) = origin.get() else {
            return Err(io::ErrorKind::NotFound.into());
        };
        f(origin.as_fd())
    })
}

fn global_ip(interface: &InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(v4.ip().into());
    }
    let v6 = address.as_sockaddr_in6()?.ip();
    (!v6.is_unicast_link_local()).then_some(v6.into())
}

/// Returns the thread to a namespace when dropped, or aborts the process.
struct RestoreNetns<'a>(BorrowedFd<'a>);

impl Drop for RestoreNetns<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            tracing::error!(
                %error,
                "this thread cannot leave the pod's network namespace: aborting, because it would \
                 serve the wrong pod"
            );
            std::process::abort();
        }
    }
}

/// Jobs that may wait for a thread.
const MAX_QUEUED_JOBS: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

/// A pool of threads for blocking work inside namespaces, such as `nft` runs, which would otherwise
/// stall the control runtime. The threads end when the last handle is dropped and the queue is
/// empty.
#[derive(Clone, Debug)]
pub struct NetnsThreads {
    // Field order matters: the threads end when the last sender is dropped, and are joined after
    // that.
    jobs: mpsc::Sender<Job>,
    _threads: Arc<JoinOnDrop>,
}

/// A job panicked, or the threads have ended before it ran.
#[derive(Debug, thiserror::Error)]
#[error("a job in a network namespace was not completed: it panicked, or its threads have ended")]
pub struct JobFailed;

#[derive(Debug)]
struct JoinOnDrop(Vec<JoinHandle<()>>);

impl Drop for JoinOnDrop {
    fn drop(&mut self) {
        for thread in self.0.drain(..) {
            // The caller of `run` has already received the failure of a panicked job.
            let _ = thread.join();
        }
    }
}

impl NetnsThreads {
    /// Starts `count` threads in the namespace of the calling thread.
    ///
    /// # Errors
    /// Fails if a thread cannot be started.
    pub fn start(name: &str, count: usize) -> io::Result<Self> {
        Self::start_in(&Netns::current()?, name, count)
    }

    /// Starts `count` threads, at least one, whose own namespace is `netns`.
    ///
    /// # Errors
    /// Fails if a thread cannot be started, or the namespace cannot be entered.
    pub fn start_in(netns: &Netns, name: &str, count: usize) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>(MAX_QUEUED_JOBS);
        let queue = Arc::new(Mutex::new(queue));
        // A new thread inherits the namespace of the thread that starts it.
        let threads = netns.enter(|| (0..count.max(1)).map(|_| spawn(name, &queue)).collect())?;
        Ok(Self {
            jobs,
            _threads: Arc::new(JoinOnDrop(threads)),
        })
    }

    /// Runs `job` on one of the threads, in order of arrival. A queued job runs to its end even if
    /// the returned future is dropped.
    ///
    /// # Errors
    /// Fails if the job panics, or the threads have ended.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JobFailed> {
        let (sender, outcome) = oneshot::channel();
        let job = Box::new(move || drop(sender.send(job())));
        self.jobs.send(job).await.map_err(|_| JobFailed)?;
        outcome.await.map_err(|_| JobFailed)
    }
}

fn spawn(name: &str, queue: &Arc<Mutex<mpsc::Receiver<Job>>>) -> io::Result<JoinHandle<()>> {
    let queue = queue.clone();
    // A waiting thread holds the lock, and releases it before it runs the job.
    let next_job = move || {
        queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .blocking_recv()
    };
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            // Opened now, so that a job needs no descriptor to enter a namespace when none is left.
            // After a failure, the first job opens it.
            let _ = with_origin(|_| Ok(()));
            while let Some(job) = next_job() {
                // A panic fails this job only: the unwinding has dropped what the job owned and
                // restored the thread's namespace, and the caller of `run` receives the failure.
                if catch_unwind(AssertUnwindSafe(job)).is_err() {
                    tracing::error!("a job in a pod's network namespace panicked");
                }
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn panic_in_a_job_fails_the_job_and_keeps_the_thread() {
        let threads = NetnsThreads::start("test", 1).expect("a thread");
        let panics = || -> u8 { panic!("panic of a test job") };
        assert!(threads.run(panics).await.is_err());
        assert_eq!(threads.run(|| 7).await.expect("the thread still runs"), 7);
    }
}
