//! A node and its pods as network namespaces, connected as by a CNI: each pod's interface ends in
//! the node's namespace, which routes. Needs root; tests fail without it.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};
use ztunnel::netns::Netns;

/// Deadline for operations that normally take milliseconds.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a test waits to verify that something does not happen.
pub(crate) const QUIET_PERIOD: Duration = Duration::from_millis(400);

/// Addresses of the node towards its pods, from which a kubelet sends probes.
pub(crate) const NODE_V4: &str = "10.77.255.1";
pub(crate) const NODE_V6: &str = "fd77:ffff::1";

/// Makes names of namespaces unique within the process.
static NEXT_NAMESPACE: AtomicU32 = AtomicU32::new(0);

/// A network namespace, deleted on drop.
pub(crate) struct Namespace {
    pub(crate) name: String,
    pub(crate) netns: Arc<Netns>,
}

impl Namespace {
    fn new(role: &str) -> Self {
        let name = format!(
            "zt{}-{}-{role}",
            std::process::id(),
            NEXT_NAMESPACE.fetch_add(1, Ordering::Relaxed)
        );
        run("ip", &["netns", "add", &name]);
        let netns = Arc::new(Netns::open(&path(&name)).expect("the new namespace"));
        let namespace = Self { name, netns };
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    /// Runs `ip` with these arguments inside.
    pub(crate) fn ip(&self, arguments: &[&str]) -> String {
        run("ip", &[&["-n", &self.name], arguments].concat())
    }

    /// Runs a program inside and returns its output.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> String {
        run(
            "ip",
            &[&["netns", "exec", &self.name, program], arguments].concat(),
        )
    }

    /// The path of the namespace.
    pub(crate) fn path(&self) -> PathBuf {
        path(&self.name)
    }

    /// Sets a kernel option inside.
    pub(crate) fn sysctl(&self, setting: &str) {
        self.run("sysctl", &["-qw", setting]);
    }

    /// The complete ruleset, and the rules and routes of policy routing, as text.
    pub(crate) fn rules_and_routes(&self) -> String {
        let routes = |family| self.ip(&[family, "route", "show", "table", "all"]);
        let rules = |family| self.ip(&[family, "rule", "show"]);
        [
            self.run("nft", &["list", "ruleset"]),
            rules("-4"),
            rules("-6"),
            routes("-4"),
            routes("-6"),
        ]
        .join("\n")
    }

    /// Listens inside.
    pub(crate) fn listen(&self, address: SocketAddr) -> TcpListener {
        self.netns
            .enter(|| TcpListener::bind(address))
            .expect("a free port")
    }

    /// Connects from inside. Fails after [`QUIET_PERIOD`].
    pub(crate) fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        self.connect_as(to, None, None)
    }

    /// Connects from inside with a mark, and from an address that need not be local.
    pub(crate) fn connect_as(
        &self,
        to: SocketAddr,
        from: Option<SocketAddr>,
        mark: Option<u32>,
    ) -> io::Result<TcpStream> {
        let socket = self.netns.enter(|| {
            let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
            if let Some(mark) = mark {
                socket.set_mark(mark)?;
            }
            if let Some(from) = from {
                socket.set_reuse_address(true)?;
                match from {
                    SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
                    SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
                }
                socket.bind(&from.into())?;
            }
            Ok(socket)
        })?;
        socket.connect_timeout(&to.into(), QUIET_PERIOD)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(stream)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .output();
    }
}

/// A pod's namespace and addresses.
pub(crate) struct Pod {
    pub(crate) inside: Namespace,
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
}

impl Pod {
    /// This port on the pod's IPv4 and IPv6 address.
    pub(crate) fn both(&self, port: u16) -> [SocketAddr; 2] {
        [
            SocketAddr::new(self.v4, port),
            SocketAddr::new(self.v6, port),
        ]
    }
}

/// A node's namespace, which routes between its pods.
pub(crate) struct Node {
    pub(crate) inside: Namespace,
    pods: u8,
}

impl Node {
    pub(crate) fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test creates network namespaces: run it as root"
        );
        remove_leftovers();
        let inside = Namespace::new("node");
        inside.sysctl("net.ipv4.ip_forward=1");
        inside.sysctl("net.ipv6.conf.all.forwarding=1");
        Self { inside, pods: 0 }
    }

    /// Adds a pod with an address of each family.
    pub(crate) fn pod(&mut self) -> Pod {
        self.pods += 1;
        self.pod_at(self.pods)
    }

    /// Adds a pod with the addresses of this number. Routes to an earlier pod of the same number
    /// are replaced.
    pub(crate) fn pod_at(&mut self, number: u8) -> Pod {
        let pod = Namespace::new("pod");
        let (host, v4, v6) = (
            format!("v{}", pod.name.replace("zt", "")),
            format!("10.77.0.{number}"),
            format!("fd77::{number}"),
        );
        let host = &host[..host.len().min(15)];
        self.inside.ip(&[
            "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", &pod.name,
        ]);
        self.inside.ip(&["link", "set", host, "up"]);
        pod.ip(&["link", "set", "eth0", "up"]);
        pod.ip(&["addr", "add", &format!("{v4}/32"), "dev", "eth0"]);
        pod.ip(&[
            "-6",
            "addr",
            "add",
            &format!("{v6}/128"),
            "dev",
            "eth0",
            "nodad",
        ]);
        self.inside
            .ip(&["addr", "add", &format!("{NODE_V4}/32"), "dev", host]);
        self.inside.ip(&[
            "-6",
            "addr",
            "add",
            &format!("{NODE_V6}/128"),
            "dev",
            host,
            "nodad",
        ]);
        self.inside
            .ip(&["-6", "addr", "add", "fe80::77/64", "dev", host, "nodad"]);
        pod.ip(&["route", "add", NODE_V4, "dev", "eth0"]);
        pod.ip(&["route", "add", "default", "via", NODE_V4]);
        pod.ip(&[
            "-6", "route", "add", "default", "via", "fe80::77", "dev", "eth0",
        ]);
        self.inside
            .ip(&["route", "replace", &v4, "dev", host, "src", NODE_V4]);
        self.inside
            .ip(&["-6", "route", "replace", &v6, "dev", host, "src", NODE_V6]);
        Pod {
            inside: pod,
            v4: v4.parse().expect("an address"),
            v6: v6.parse().expect("an address"),
        }
    }
}

/// Polls until a condition returns a value, and fails the test after [`TIMEOUT`]. For changes of
/// other processes and of the kernel that have no event.
#[track_caller]
#[allow(clippy::disallowed_methods)]
pub(crate) fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "timeout: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Accepts one connection, or fails the test after [`TIMEOUT`].
#[track_caller]
pub(crate) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    assert!(connection_arrives(listener, TIMEOUT), "no connection");
    let (stream, from) = listener.accept().expect("a connection");
    stream.set_nonblocking(false).expect("a socket option");
    stream
        .set_read_timeout(Some(TIMEOUT))
        .expect("a socket option");
    (stream, from)
}

/// Whether no connection arrives within [`QUIET_PERIOD`].
pub(crate) fn no_connection_arrives(listener: &TcpListener) -> bool {
    !connection_arrives(listener, QUIET_PERIOD)
}

fn connection_arrives(listener: &TcpListener, within: Duration) -> bool {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    poll(
        &mut fds,
        PollTimeout::try_from(within).expect("a short time"),
    )
    .expect("an open listener")
        > 0
}

/// Sends bytes one way and asserts that they arrive.
#[track_caller]
pub(crate) fn assert_carries(mut from: &TcpStream, mut to: &TcpStream, bytes: &[u8]) {
    use std::io::{Read, Write};
    from.write_all(bytes).expect("an open connection");
    let mut received = vec![0; bytes.len()];
    to.read_exact(&mut received).expect("an open connection");
    assert_eq!(received, bytes);
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

/// Runs a program that must succeed, and returns its output.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} is needed: {error}"));
    assert!(
        status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&stderr)
    );
    String::from_utf8_lossy(&stdout).into_owned()
}

/// Deletes the namespaces of test processes that were killed.
fn remove_leftovers() {
    let Ok(names) = std::fs::read_dir("/run/netns") else {
        return;
    };
    for name in names
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
    {
        let process = name
            .strip_prefix("zt")
            .and_then(|rest| rest.split_once('-'))
            .and_then(|(pid, _)| pid.parse::<u32>().ok());
        if process.is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists()) {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}
