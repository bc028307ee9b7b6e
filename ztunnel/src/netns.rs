//! Network namespaces: a pod's is opened once, proven by its identity, and entered for as long as
//! it takes to make a socket.
//!
//! A thread that stayed behind in a pod's namespace would open the next tenant's sockets there, so
//! the way back is not allowed to fail: [`Netns::enter`] aborts the process rather than go on from
//! the wrong place.

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

/// The magic number of `nsfs`, the file system of which every namespace is an inode
/// (`linux/magic.h`, `NSFS_MAGIC`).
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// What the kernel calls a network namespace: the inode is given anew only after the last holder
/// has let go.
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

/// An open network namespace; it exists for at least as long as this value does.
#[derive(Debug)]
pub struct Netns {
    file: File,
    id: NetnsId,
    path: PathBuf,
}

thread_local! {
    /// Where this thread lives: the namespace that it was in when it first entered another.
    static HOME: OnceCell<File> = const { OnceCell::new() };
}

impl Netns {
    /// Opens the namespace that is mounted, or linked by `/proc`, at `path`.
    ///
    /// # Errors
    /// Fails if `path` cannot be opened, or is an ordinary file: what is left after the namespace's
    /// mount has gone.
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

    /// The kernel's name of this namespace.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// The path by which it was opened; for messages.
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

    /// Runs `f` on this thread inside the namespace and comes back. A socket belongs to the
    /// namespace in which it was made, so `f` makes sockets and returns; it must not wait, and must
    /// not call `enter` itself.
    ///
    /// # Errors
    /// Fails if the namespace cannot be entered (needs `CAP_SYS_ADMIN`), or as `f` fails.
    ///
    /// Aborts the process if the thread cannot come back.
    pub fn enter<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        HOME.with(|home| {
            if home.get().is_none() {
                let file = File::open("/proc/thread-self/ns/net")?;
                home.get_or_init(|| file);
            }
            let Some(home) = home.get() else {
                return Err(io::ErrorKind::NotFound.into());
            };
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            // The guard, not the next line, brings the thread back: `f` may panic.
            let _way_back = WayBack(home.as_fd());
            f()
        })
    }
}

fn global_ip(interface: &InterfaceAddress) -> Option<IpAddr> {
    let address = interface.address.as_ref()?;
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(v4.ip().into());
    }
    let v6 = address.as_sockaddr_in6()?.ip();
    (!v6.is_unicast_link_local()).then_some(v6.into())
}

struct WayBack<'a>(BorrowedFd<'a>);

impl Drop for WayBack<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            tracing::error!(
                %error,
                "this thread cannot leave the pod's network namespace: better no daemon than one \
                 that serves the wrong pod"
            );
            std::process::abort();
        }
    }
}

/// Jobs that may wait for a thread.
const JOBS: usize = 64;

type Job = Box<dyn FnOnce() + Send>;

/// Threads for work inside namespaces that takes as long as the kernel or `nft` takes, so that the
/// control runtime never waits for either. They end when the last handle is dropped and the last job
/// is done.
#[derive(Clone, Debug)]
pub struct NetnsThreads {
    // Dropped in this order: the threads end when the last sender has gone, and are then joined.
    jobs: mpsc::Sender<Job>,
    _joined: Arc<Joined>,
}

/// The threads are gone, or the job has panicked.
#[derive(Debug, thiserror::Error)]
#[error("the work in the network namespace was not done: it panicked, or its threads have ended")]
pub struct JobFailed;

#[derive(Debug)]
struct Joined(Vec<JoinHandle<()>>);

impl Drop for Joined {
    fn drop(&mut self) {
        for thread in self.0.drain(..) {
            // A panic of a job has been told to whoever waited for it.
            let _ = thread.join();
        }
    }
}

impl NetnsThreads {
    /// Starts `count` threads, in the namespace of the calling one.
    ///
    /// # Errors
    /// Fails if the system gives no thread.
    pub fn start(name: &str, count: usize) -> io::Result<Self> {
        Self::start_in(&Netns::current()?, name, count)
    }

    /// Starts `count` threads in `home`.
    ///
    /// # Errors
    /// Fails if the system gives no thread, or the namespace cannot be entered.
    pub fn start_in(home: &Netns, name: &str, count: usize) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>(JOBS);
        let queue = Arc::new(Mutex::new(queue));
        // A new thread lives where the one that made it is.
        let threads = home.enter(|| (0..count.max(1)).map(|_| spawn(name, &queue)).collect())?;
        Ok(Self {
            jobs,
            _joined: Arc::new(Joined(threads)),
        })
    }

    /// Runs `job` on one of the threads, in its turn. The job runs to its end even if nobody waits
    /// for the answer any more.
    ///
    /// # Errors
    /// Fails if the job panics, or the threads have ended.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JobFailed> {
        let (answer, answered) = oneshot::channel();
        let job = Box::new(move || drop(answer.send(job())));
        self.jobs.send(job).await.map_err(|_| JobFailed)?;
        answered.await.map_err(|_| JobFailed)
    }
}

fn spawn(name: &str, queue: &Arc<Mutex<mpsc::Receiver<Job>>>) -> io::Result<JoinHandle<()>> {
    let queue = queue.clone();
    // The thread that waits for a job holds the lock; it lets go of it before the job begins.
    let next = move || {
        queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .blocking_recv()
    };
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            while let Some(job) = next() {
                // What a job breaks in its fall it takes with it, and whoever waits for it hears of
                // it. The thread is there for others; it is back from the namespace by then.
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
    async fn a_job_that_panics_ends_itself_and_not_its_thread() {
        let threads = NetnsThreads::start("test", 1).expect("a thread");
        let fall = || -> u8 { panic!("on purpose") };
        assert!(threads.run(fall).await.is_err());
        assert_eq!(threads.run(|| 7).await.expect("the thread lives"), 7);
    }
}
