//! A node with pods, their Kubernetes objects, and the daemon.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tempfile::TempDir;
use ztunnel::netns::Netns;

use crate::namespaces::{self, NODE_V4, NODE_V6, Node, eventually};

/// A pod with the name and uid of its object.
pub(crate) struct NamedPod {
    pub(crate) pod: namespaces::Pod,
    name: String,
    uid: String,
}

impl NamedPod {
    /// The pod's workload uid, as in the config dump.
    fn workload_uid(&self) -> String {
        format!("Kubernetes//Pod/shop/{}/{}", self.name, self.uid)
    }
}

/// One node and its objects.
pub(crate) struct Fixture {
    node: Node,
    folder: TempDir,
    pods: u8,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["objects", "netns", "ca"] {
            fs::create_dir(folder.path().join(name)).expect("a folder");
        }
        mesh::certs::LocalCa::create(&folder.path().join("ca")).expect("a certificate authority");
        let fixture = Self {
            node: Node::new(),
            folder,
            pods: 0,
        };
        fixture.object(
            "node",
            &format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: a}}\nstatus:\n  addresses:\n\
             \x20 - {{type: InternalIP, address: {NODE_V4}}}\n\
             \x20 - {{type: InternalIP, address: \"{NODE_V6}\"}}\n"
            ),
        );
        fixture.object(
            "namespace",
            "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n",
        );
        fixture.object(
            "account",
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: default, namespace: shop}\n",
        );
        fixture
    }

    /// Adds a pod with the next free addresses, opted in if `meshed`.
    pub(crate) fn pod(&mut self, name: &str, meshed: bool) -> NamedPod {
        self.pods += 1;
        self.pod_at(name, "first", meshed, self.pods)
    }

    /// Adds a pod with the addresses of this number. `incarnation` makes its uid unique.
    pub(crate) fn pod_at(
        &mut self,
        name: &str,
        incarnation: &str,
        meshed: bool,
        number: u8,
    ) -> NamedPod {
        let pod = NamedPod {
            pod: self.node.pod_at(number),
            name: name.into(),
            uid: format!("{name}-{incarnation}"),
        };
        self.write_netns(&pod, &pod.pod.inside.path());
        self.write(&pod, meshed);
        pod
    }

    /// Writes the file with the path of the pod's namespace.
    pub(crate) fn write_netns(&self, pod: &NamedPod, path: &Path) {
        self.replace(&format!("netns/{}", pod.uid), &path.display().to_string());
    }

    /// Writes the pod's object, opted in if `meshed`.
    pub(crate) fn write(&self, pod: &NamedPod, meshed: bool) {
        let mode = if meshed { "ambient" } else { "none" };
        let NamedPod {
            name,
            uid,
            pod: namespaces::Pod { v4, v6, .. },
        } = pod;
        let object = format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n\
             \x20 name: {name}\n  namespace: shop\n  uid: {uid}\n\
             \x20 labels: {{istio.io/dataplane-mode: {mode}}}\n\
             spec:\n\
             \x20 nodeName: a\n  serviceAccountName: default\n\
             \x20 containers: [{{name: app, image: app}}]\n\
             status:\n\
             \x20 phase: Running\n  podIP: {v4}\n  podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]\n\
             \x20 conditions: [{{type: Ready, status: \"True\"}}]\n"
        );
        self.object(uid, &object);
    }

    /// Runs a program in the node's namespace and returns its output.
    pub(crate) fn run_in_node(&self, program: &str, arguments: &[&str]) -> String {
        self.node.inside.run(program, arguments)
    }

    /// Deletes the pod's object and the file of its namespace. Dropping the pod deletes the
    /// namespace.
    pub(crate) fn delete(&self, pod: &NamedPod) {
        fs::remove_file(self.folder.path().join(format!("objects/{}.yaml", pod.uid)))
            .expect("its object");
        fs::remove_file(self.folder.path().join(format!("netns/{}", pod.uid))).expect("its file");
    }

    fn object(&self, name: &str, yaml: &str) {
        self.replace(&format!("objects/{name}.yaml"), yaml);
    }

    /// Replaces a file atomically.
    fn replace(&self, name: &str, content: &str) {
        let new = self.folder.path().join("new");
        fs::write(&new, content).expect("a file");
        fs::rename(&new, self.folder.path().join(name)).expect("a file");
    }
}

/// A running daemon, killed on drop.
pub(crate) struct Daemon {
    node: Arc<Netns>,
    child: Mutex<Child>,
}

impl Daemon {
    /// Starts the binary in the node's namespace.
    pub(crate) fn start(fixture: &Fixture) -> Self {
        Self::start_with_objects(fixture, &[])
    }

    /// Starts the binary in the node's namespace with these arguments in addition.
    pub(crate) fn start_with_objects(fixture: &Fixture, arguments: &[&str]) -> Self {
        let objects = fixture.folder.path().join("objects").display().to_string();
        let source: &[&str] = &["--source-folder", &objects];
        Self::start_with(fixture, &[source, arguments].concat())
    }

    /// Starts the binary without a source folder, with these arguments in addition to the usual
    /// ones.
    pub(crate) fn start_with(fixture: &Fixture, arguments: &[&str]) -> Self {
        let folder = |name: &str| fixture.folder.path().join(name).display().to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ztunnel"));
        command
            .args([
                "--node-name",
                "a",
                "--ca-dir",
                &folder("ca"),
                "--netns-dir",
                &folder("netns"),
            ])
            .args(["--worker-threads", "2", "--log-level", "info"])
            .args(arguments)
            .stdin(Stdio::null());
        // A child process inherits the namespace of the thread that starts it.
        let child = fixture
            .node
            .inside
            .netns
            .enter(|| command.spawn())
            .expect("the binary");
        Self {
            node: fixture.node.inside.netns.clone(),
            child: Mutex::new(child),
        }
    }

    /// Waits until the daemon is ready.
    pub(crate) fn wait_ready(&self) {
        eventually("the daemon is ready", || {
            self.get(15021, "/healthz/ready")?
                .starts_with("HTTP/1.1 200")
                .then_some(())
        });
    }

    /// The state of a pod on the admin page.
    pub(crate) fn state(&self, pod: &NamedPod) -> Option<String> {
        let dump = self.dump();
        let body = dump.split_once("\r\n\r\n")?.1;
        let dump: Value = serde_json::from_str(body).expect("the dump is JSON");
        Some(
            dump["workloadState"].get(pod.workload_uid())?["state"]
                .as_str()?
                .to_string(),
        )
    }

    /// The config dump, with the HTTP header.
    pub(crate) fn dump(&self) -> String {
        self.get(15000, "/config_dump").expect("the admin page")
    }

    /// The sum of a metric over its labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let metrics = self.get(15020, "/metrics").expect("the metrics");
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .sum()
    }

    fn get(&self, port: u16, path: &str) -> Option<String> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut stream = self
            .node
            .enter(|| TcpStream::connect_timeout(&address, namespaces::TIMEOUT))
            .ok()?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        .ok()?;
        let mut response = String::new();
        stream.read_to_string(&mut response).ok()?;
        Some(response)
    }

    /// Opens a keep-alive connection to the admin page.
    pub(crate) fn admin(&self) -> AdminClient {
        let address = SocketAddr::from(([127, 0, 0, 1], 15000));
        let connect = || TcpStream::connect_timeout(&address, namespaces::TIMEOUT);
        let stream = self.node.enter(connect).expect("the admin page");
        let timeout = stream.set_read_timeout(Some(namespaces::TIMEOUT));
        timeout.expect("a socket option");
        let mut admin = AdminClient(BufReader::new(stream));
        // Connecting does not wait for the daemon to accept, so send a request: later it may have
        // no descriptor left to accept with.
        admin.dump().expect("the admin page");
        admin
    }

    /// Limits the daemon to its open descriptors and `free` more.
    pub(crate) fn leave_descriptors(&self, free: usize) {
        let pid = self.child.lock().unwrap().id();
        let open: BTreeSet<usize> = fs::read_dir(format!("/proc/{pid}/fd"))
            .expect("the daemon runs")
            .filter_map(|fd| fd.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        let limit = (0..).filter(|fd| !open.contains(fd)).nth(free);
        self.limit_descriptors(limit.unwrap_or_default());
    }

    /// Sets the daemon's limit of open files: one above the highest descriptor that it may open.
    pub(crate) fn limit_descriptors(&self, limit: usize) {
        let pid = self.child.lock().unwrap().id();
        let soft = format!("--nofile={limit}:");
        namespaces::run("prlimit", &["--pid", &pid.to_string(), &soft]);
    }

    /// Kills it with SIGKILL.
    pub(crate) fn kill(self) {
        self.signal("KILL");
        assert_eq!(self.exit_code(), None);
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: &str) {
        let pid = self.child.lock().unwrap().id().to_string();
        namespaces::run("kill", &[&format!("-{signal}"), &pid]);
    }

    /// Waits until it exits and returns the exit code, or `None` if a signal killed it.
    pub(crate) fn exit_code(&self) -> Option<i32> {
        eventually("the daemon exits", || {
            self.child.lock().unwrap().try_wait().expect("a child")
        })
        .code()
    }
}

/// A keep-alive connection to the admin page.
pub(crate) struct AdminClient(BufReader<TcpStream>);

impl AdminClient {
    /// The state of a pod and its reason.
    pub(crate) fn state(&mut self, pod: &NamedPod) -> Option<(String, String)> {
        let dump = self.dump()?;
        let state = dump["workloadState"].get(pod.workload_uid())?;
        let text = |key: &str| state[key].as_str().unwrap_or_default().to_string();
        Some((text("state"), text("reason")))
    }

    fn dump(&mut self) -> Option<Value> {
        let request = "GET /config_dump HTTP/1.1\r\nHost: localhost\r\n\r\n";
        self.0.get_mut().write_all(request.as_bytes()).ok()?;
        let (mut line, mut length) = (String::new(), 0);
        while self.0.read_line(&mut line).ok()? > 2 {
            let (name, value) = line.split_once(':').unwrap_or_default();
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse().ok()?;
            }
            line.clear();
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).ok()?;
        serde_json::from_slice(&body).ok()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }
}
