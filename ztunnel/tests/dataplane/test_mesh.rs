//! Three pods on one switch, made of network namespaces: `a` and `b` are in the mesh, `c` is not.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hbone::{
    ClientTls, ConnectRequest, ConnectResponse, Credentials, Pool, PoolConfig, PoolKey, Reason,
};
use mesh::certs::{Certificates, CertificatesConfig, LocalCa};
use mesh::objects::{Objects, parse};
use mesh::{Params, Store, WorkloadUid, compile};
use socket2::{Domain, Socket, Type};
use spiffe::{SpiffeId, TrustDomain};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use ztunnel::capture::{self, Capture, Redirection, Rules};
use ztunnel::dataplane::{DataPlane, DataPlaneConfig, Pod};
use ztunnel::identity::Identities;
use ztunnel::netns::Netns;
use ztunnel::telemetry::Telemetry;

/// Limit for every step of a test.
pub(crate) const TEST_TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) const PODS: [&str; 3] = ["a", "b", "c"];

static MESHES: AtomicUsize = AtomicUsize::new(0);

/// The network namespaces of one test; deleted on drop.
struct Namespaces {
    prefix: String,
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("these tests need iproute2");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "these tests need root and network namespaces: ip {arguments}: {error}"
    );
}

impl Namespaces {
    fn new() -> Self {
        let number = MESHES.fetch_add(1, Ordering::Relaxed);
        let this = Self {
            prefix: format!("zt-{}-{number}", std::process::id()),
        };
        let switch = this.name("sw");
        ip(&format!("netns add {switch}"));
        ip(&format!("-n {switch} link add br0 type bridge"));
        ip(&format!("-n {switch} link set br0 up"));
        for (number, pod) in (1..).zip(PODS) {
            let name = this.name(pod);
            ip(&format!("netns add {name}"));
            ip(&format!("-n {name} link set lo up"));
            ip(&format!(
                "link add eth0 netns {name} type veth peer name port-{pod} netns {switch}"
            ));
            ip(&format!(
                "-n {switch} link set dev port-{pod} master br0 up"
            ));
            ip(&format!("-n {name} link set eth0 up"));
            ip(&format!(
                "-n {name} address add 10.77.0.{number}/24 dev eth0"
            ));
            ip(&format!(
                "-n {name} address add fd77::{number}/64 dev eth0 nodad"
            ));
            // Service addresses must be routable; in a cluster the default route does that.
            ip(&format!("-n {name} route add 10.96.0.0/16 via 10.77.0.254"));
            ip(&format!(
                "-n {name} neigh add 10.77.0.254 lladdr 02:00:00:00:00:01 dev eth0"
            ));
        }
        this
    }

    fn name(&self, pod: &str) -> String {
        format!("{}-{pod}", self.prefix)
    }

    fn open(&self, pod: &str) -> Arc<Netns> {
        Arc::new(
            Netns::open(&PathBuf::from(format!("/run/netns/{}", self.name(pod))))
                .expect("the namespace was just created"),
        )
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for pod in PODS.iter().chain(&["sw"]) {
            let _ = Command::new("ip")
                .args(["netns", "del", &self.name(pod)])
                .output();
        }
    }
}

/// The mesh of the three pods.
pub(crate) struct TestMesh {
    pub(crate) data_plane: DataPlane,
    store: Store,
    telemetry: Arc<Telemetry>,
    ca: Arc<LocalCa>,
    tasks: JoinSet<()>,
    stop: CancellationToken,
    namespaces: Namespaces,
}

/// What a test can change.
pub(crate) struct Options {
    pub(crate) max_connections_per_pod: usize,
    pub(crate) max_handshakes_per_pod: usize,
    pub(crate) certificates: bool,
    pub(crate) trust_domain_aliases: Vec<TrustDomain>,
    pub(crate) readiness: Option<(std::net::TcpListener, Arc<ztunnel::readiness::Readiness>)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_connections_per_pod: 1000,
            max_handshakes_per_pod: 100,
            certificates: true,
            trust_domain_aliases: vec![],
            readiness: None,
        }
    }
}

impl TestMesh {
    pub(crate) async fn new(options: Options) -> Self {
        let namespaces = Namespaces::new();
        let store = Store::new();
        assert_eq!(publish(&store, &manifests()), [""; 0]);
        let telemetry = Arc::new(Telemetry::new(None).expect("metric names are unique"));
        let folder = tempfile::tempdir().expect("a temporary folder");
        let ca = Arc::new(LocalCa::create(folder.path()).expect("a new certificate authority"));
        let (certificates, renewal) = Certificates::new(ca.clone(), CertificatesConfig::default());
        let identities = Identities::new(certificates, hbone::Revocations::none());
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(renewal.run(stop.clone()));
        let (publisher, recorded, stopped) = (identities.clone(), telemetry.clone(), stop.clone());
        tasks.spawn(async move { publisher.run(&recorded, stopped).await });
        if options.certificates {
            let meshed = ["a", "b"].map(|pod| {
                store
                    .model()
                    .workload(&uid(pod))
                    .expect("the pod is in the model")
                    .identity
                    .clone()
            });
            identities.set_identities(meshed.iter().cloned().collect());
        }
        let config = DataPlaneConfig {
            workers: 2,
            max_connections_per_pod: options.max_connections_per_pod,
            max_handshakes_per_pod: options.max_handshakes_per_pod,
            identities,
            readiness: options.readiness,
            trust_domain_aliases: options.trust_domain_aliases,
            tunnel_max_age: Duration::from_secs(3600),
        };
        let data_plane =
            DataPlane::start(config, store.clone(), telemetry.clone()).expect("threads");
        let mesh = Self {
            data_plane,
            store,
            telemetry,
            ca,
            tasks,
            stop,
            namespaces,
        };
        mesh.enrol("a").await;
        mesh.enrol("b").await;
        mesh
    }

    pub(crate) async fn enrol(&self, pod: &str) {
        let netns = self.namespaces.open(pod);
        let listeners =
            capture::listeners(&netns, self.data_plane.workers()).expect("ports are free");
        self.data_plane
            .add(Pod {
                workload: uid(pod),
                netns: netns.clone(),
                listeners,
            })
            .await
            .expect("the pod is added");
        Capture::apply(netns, Rules::Redirect(Redirection::default()))
            .expect("these tests need nft");
    }

    /// Replaces the model with the pods and these policies.
    pub(crate) fn apply_policies(&self, policies: &str) {
        self.publish(&manifests(), policies);
    }

    /// Replaces the model with these manifests and policies.
    pub(crate) fn publish(&self, manifests: &str, policies: &str) {
        let problems = publish(&self.store, &format!("{manifests}---\n{policies}"));
        assert_eq!(problems, [""; 0]);
    }

    /// An application's listener in a pod.
    pub(crate) fn listen(&self, pod: &str, address: &str) -> TcpListener {
        let address: SocketAddr = address.parse().expect("an address");
        let listener = self
            .namespaces
            .open(pod)
            .enter(|| std::net::TcpListener::bind(address))
            .expect("the address is free");
        listener.set_nonblocking(true).expect("a socket");
        TcpListener::from_std(listener).expect("a runtime")
    }

    /// An application in a pod that never accepts; its backlog holds one connection.
    pub(crate) fn listen_without_accepting(&self, pod: &str, address: &str) -> Socket {
        let address: SocketAddr = address.parse().expect("an address");
        let listening = || {
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            socket.bind(&address.into())?;
            socket.listen(0)?;
            Ok(socket)
        };
        let socket = self.namespaces.open(pod).enter(listening);
        socket.expect("the address is free")
    }

    /// An application's connection from a pod.
    pub(crate) async fn connect(&self, pod: &str, to: &str) -> io::Result<TcpStream> {
        let to: SocketAddr = to.parse().expect("an address");
        let kind = Type::STREAM.nonblocking();
        let socket = self
            .namespaces
            .open(pod)
            .enter(|| Socket::new(Domain::for_address(to), kind, None))?;
        within_timeout(TcpSocket::from_std_stream(socket.into()).connect(to)).await
    }

    /// Adds an address that no object lists to a pod. Returns when the pod's kernel treats it as
    /// local, which for IPv6 takes a moment.
    pub(crate) async fn add_address(&self, pod: &str, address: &str) {
        let pod = self.namespaces.name(pod);
        let unchecked = if address.contains(':') { " nodad" } else { "" };
        ip(&format!(
            "-n {pod} address add {address} dev eth0{unchecked}"
        ));
        let is_own = |_: &Self| {
            let output = Command::new("ip")
                .args(["-n", &pod, "route", "get", address])
                .output()
                .expect("these tests need iproute2");
            output.stdout.starts_with(b"local")
        };
        self.wait_until("the address to be local", is_own).await;
    }

    /// Sends a CONNECT from pod `c` to pod `b` with a certificate of the mesh's root for
    /// `identity`, and returns the response. Runs in a `LocalSet`.
    pub(crate) async fn send_connect(
        &self,
        identity: &str,
        authority: &str,
    ) -> Result<ConnectResponse, Reason> {
        let identity = SpiffeId::new(identity).expect("an identity");
        let certificate = self
            .ca
            .issue(&identity, Duration::from_secs(60))
            .expect("a certificate");
        let credentials = Credentials {
            chain: certificate.chain.clone(),
            key: certificate.key(),
            roots: self.ca.authority().bundle().roots().to_vec(),
            revocations: hbone::Revocations::none(),
        };
        let tls = ClientTls::new(&credentials).expect("usable credentials");
        let expected = SpiffeId::new("spiffe://cluster.local/ns/shop/sa/b").expect("an identity");
        let key = PoolKey {
            source: identity,
            destination: "b".into(),
            address: "10.77.0.2:15008".parse().expect("an address"),
        };
        let pool = Pool::new(
            PoolConfig::default(),
            Rc::new(PodSocketFactory(self.namespaces.open("c"))),
        );
        let request = ConnectRequest::new(authority.parse().expect("an authority"));
        let response = async {
            let mut stream = pool.open(&key, &[expected], &tls, request).await?;
            stream.response().await
        };
        let response = within_timeout(response)
            .await
            .map_err(|error| error.reason());
        pool.close(Instant::now()).await;
        response
    }

    /// The sum of a metric over all series whose labels contain all of `labels`.
    pub(crate) fn metric_sum(&self, name: &str, labels: &[&str]) -> f64 {
        let text = self.telemetry.scrape().expect("metrics");
        let series = text.lines().filter(|line| {
            line.split(['{', ' ']).next() == Some(name)
                && labels.iter().all(|label| line.contains(label))
        });
        series
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Waits until other threads make a condition true; panics with `what` and all metrics if they
    /// do not.
    pub(crate) async fn wait_until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let holds = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let metrics = || self.telemetry.scrape().unwrap_or_default();
        timeout(TEST_TIMEOUT, holds)
            .await
            .unwrap_or_else(|_| panic!("timed out waiting for {what}; metrics:\n{}", metrics()));
    }

    /// Joins the threads and deletes the namespaces.
    pub(crate) async fn shut_down(mut self) {
        self.data_plane.drain(Duration::ZERO).await;
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Creates sockets in a pod.
struct PodSocketFactory(Arc<Netns>);

impl hbone::SocketFactory for PodSocketFactory {
    fn new_tcp(&self, to: SocketAddr) -> io::Result<TcpSocket> {
        let kind = Type::STREAM.nonblocking();
        let socket = self
            .0
            .enter(|| Socket::new(Domain::for_address(to), kind, None))?;
        Ok(TcpSocket::from_std_stream(socket.into()))
    }
}

pub(crate) async fn within_timeout<T>(work: impl Future<Output = T>) -> T {
    timeout(TEST_TIMEOUT, work)
        .await
        .expect("a step that ends in time")
}

pub(crate) fn uid(pod: &str) -> WorkloadUid {
    WorkloadUid::of_pod(
        "Kubernetes",
        if pod == "c" { "outside" } else { "shop" },
        pod,
        &format!("uid-{pod}"),
    )
}

/// Replaces the model; returns the problems of the manifests.
fn publish(store: &Store, manifests: &str) -> Vec<String> {
    let mut objects = Objects::default();
    for (object, origin) in parse(&"mesh.yaml".into(), manifests.as_bytes()).objects {
        objects.insert(object, origin);
    }
    let params = Params::new("cluster.local".parse().expect("a trust domain"));
    let (model, problems) = compile(&objects, &params);
    let messages = problems.iter().map(ToString::to_string).collect();
    store.apply(model, problems);
    messages
}

pub(crate) fn manifests() -> String {
    let mut yaml = String::from(
        "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: v1
kind: Node
metadata: {name: node}
status: {addresses: [{type: InternalIP, address: 10.77.0.254}]}
---
apiVersion: v1
kind: Service
metadata: {name: both, namespace: shop}
spec: {clusterIP: 10.96.0.1, clusterIPs: [10.96.0.1], selector: {serves: both}, ports: [{port: 80, targetPort: 8080}]}
",
    );
    for (number, pod) in (1..).zip(PODS) {
        let namespace = if pod == "c" { "outside" } else { "shop" };
        yaml += &format!(
            "---
apiVersion: v1
kind: Pod
metadata: {{name: {pod}, namespace: {namespace}, uid: uid-{pod}, labels: {{serves: both, app: {pod}}}}}
spec: {{nodeName: node, serviceAccountName: {pod}, containers: [{{name: app, image: app}}]}}
status:
  phase: Running
  podIP: 10.77.0.{number}
  podIPs: [{{ip: 10.77.0.{number}}}, {{ip: 'fd77::{number}'}}]
  conditions: [{{type: Ready, status: 'True'}}]
"
        );
    }
    yaml
}

/// The address of a pod.
pub(crate) fn address(pod: &str) -> IpAddr {
    let number = PODS.iter().position(|name| *name == pod).expect("a pod") + 1;
    format!("10.77.0.{number}").parse().expect("an address")
}
