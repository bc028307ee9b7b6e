//! The connectivity matrix: {meshed, unmeshed} client x {meshed, unmeshed} server x {same node, cross
//! node} x {IPv4, IPv6} x {pod IP, ClusterIP, headless name}. A cell is one request of curl to nginx.

mod checks;

use std::fmt;
use std::net::IpAddr;

use anyhow::{Context, Result};
use lab::{IpFamily, Lab, Location};

use crate::manifest::{self, Pod, Service};
use crate::programs::{self, CurlResponse, PORT};

pub use checks::{check_counts, check_request, check_wire};

/// How the client addresses the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// The pod's address.
    PodIp,
    /// The ClusterIP of a service that selects only this pod.
    ClusterIp,
    /// The name of a headless service, which resolves to the pod's address.
    Headless,
}

impl Destination {
    const ALL: [Self; 3] = [Self::PodIp, Self::ClusterIp, Self::Headless];
}

/// One cell of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// Whether the client is in the mesh.
    pub client_meshed: bool,
    /// Whether the server is in the mesh.
    pub server_meshed: bool,
    /// Whether both run on node `a`. Otherwise the server runs on node `b`.
    pub same_node: bool,
    /// The family of the addresses.
    pub family: IpFamily,
    /// How the client addresses the server.
    pub destination: Destination,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mesh = |meshed| if meshed { "meshed" } else { "unmeshed" };
        let nodes = if self.same_node {
            "same node"
        } else {
            "cross node"
        };
        let (client, server) = (mesh(self.client_meshed), mesh(self.server_meshed));
        write!(
            f,
            "{client} -> {server}, {nodes}, {:?}, {:?}",
            self.family, self.destination
        )
    }
}

impl Cell {
    /// All 48 cells.
    pub fn all() -> Vec<Self> {
        let both = [true, false];
        let mut cells = Vec::new();
        for client_meshed in both {
            for server_meshed in both {
                for same_node in both {
                    for family in IpFamily::ALL {
                        let cell = |destination| Self {
                            client_meshed,
                            server_meshed,
                            same_node,
                            family,
                            destination,
                        };
                        cells.extend(Destination::ALL.map(cell));
                    }
                }
            }
        }
        cells
    }

    /// Whether both sides are in the mesh, so that no plaintext may cross the wire.
    pub fn is_mutual_tls(&self) -> bool {
        self.client_meshed && self.server_meshed
    }

    /// The client pod's namespace.
    pub fn client_namespace(&self) -> &'static str {
        namespace(self.client_meshed)
    }

    /// The server pod's namespace.
    pub fn server_namespace(&self) -> &'static str {
        namespace(self.server_meshed)
    }

    /// The name of the server pod and its ClusterIP service.
    pub fn server(&self) -> &'static str {
        server(self.same_node)
    }

    /// The server pod's node.
    pub fn server_node(&self) -> &'static str {
        if self.same_node { "a" } else { "b" }
    }

    /// The client pod, `namespace/name`.
    pub fn client_pod(&self) -> String {
        format!("{}/{CLIENT}", self.client_namespace())
    }

    /// The server pod, `namespace/name`.
    pub fn server_pod(&self) -> String {
        format!("{}/{}", self.server_namespace(), self.server())
    }

    fn url(&self, lab: &Lab) -> Result<String> {
        let (namespace, server) = (self.server_namespace(), self.server());
        Ok(match self.destination {
            Destination::PodIp => programs::url(lab.pod_ip(&self.server_pod(), self.family)?, PORT),
            Destination::ClusterIp => {
                let ip = lab.service_ip(&format!("{namespace}/{server}"), self.family)?;
                programs::url(ip, SERVICE_PORT)
            }
            // A headless service maps no ports: the client connects to the target port.
            Destination::Headless => {
                format!("http://{server}-pods.{namespace}.svc.cluster.local:{PORT}/")
            }
        })
    }
}

/// The client pods' name.
pub const CLIENT: &str = "client";

/// The services' port, which differs from the servers' port.
pub const SERVICE_PORT: u16 = 80;

/// The namespace of meshed or unmeshed pods.
fn namespace(meshed: bool) -> &'static str {
    if meshed { "in" } else { "out" }
}

fn server(same_node: bool) -> &'static str {
    if same_node { "near" } else { "far" }
}

/// Two nodes. Both inside and outside the mesh a client on node `a` and a server on each node, and a
/// ClusterIP service and a headless service for each server.
pub fn manifests() -> String {
    let mut all = vec![manifest::two_nodes()];
    for meshed in [true, false] {
        let namespace = namespace(meshed);
        all.push(manifest::namespace(namespace, meshed.then_some("ambient")));
        all.push(Pod::new(namespace, CLIENT).on("a").into());
        for same_node in [true, false] {
            let name = server(same_node);
            // The response contains the marker, so that the detector can find each direction.
            let server = programs::nginx(&[PORT], "$remote_addr reply-$http_x_marker");
            let node = if same_node { "a" } else { "b" };
            all.push(
                Pod::new(namespace, name)
                    .on(node)
                    .runs(server)
                    .port(None, PORT)
                    .into(),
            );
            all.push(Service::new(namespace, name, SERVICE_PORT, PORT).into());
            let pods = format!("{name}-pods");
            all.push(
                Service::new(namespace, &pods, PORT, PORT)
                    .selecting(name)
                    .headless()
                    .into(),
            );
        }
    }
    manifest::all(all)
}

/// A request with its response.
#[derive(Debug)]
pub struct Request {
    /// The cell of the matrix.
    pub cell: Cell,
    /// A text that is unique to the request.
    pub marker: String,
    /// The client pod's address.
    pub client_ip: IpAddr,
    /// The server pod's address.
    pub server_ip: IpAddr,
    /// The ClusterIP of the server's service.
    pub service_ip: IpAddr,
    /// The response.
    pub response: CurlResponse,
}

/// Sends the request of a cell, the `index`th one of the lab.
///
/// # Errors
/// curl fails.
pub fn request(lab: &Lab, cell: Cell, index: usize) -> Result<Request> {
    // The marker has `index` more bytes: no two requests have the same length, so that the byte counts
    // of an access-log line identify the request.
    let marker = format!("marker-{index:02}-{}{}", lab.name(), "x".repeat(index));
    let family = match cell.family {
        IpFamily::V4 => "-4",
        IpFamily::V6 => "-6",
    };
    let header = format!("X-Marker: {marker}");
    let client = Location::Pod(cell.client_pod());
    let args = ["-A", "e2e", "-H", &header, "-H", "Host: e2e", family];
    let response = programs::curl(lab, &client, &cell.url(lab)?, &args).context("no response")?;
    let server = format!("{}/{}", cell.server_namespace(), cell.server());
    Ok(Request {
        cell,
        marker,
        client_ip: lab.pod_ip(&cell.client_pod(), cell.family)?,
        server_ip: lab.pod_ip(&cell.server_pod(), cell.family)?,
        service_ip: lab.service_ip(&server, cell.family)?,
        response,
    })
}

/// The identity of a pod. Each pod has a service account of its own name.
pub fn identity(namespace: &str, pod: &str) -> String {
    format!("spiffe://cluster.local/ns/{namespace}/sa/{pod}")
}
