//! The lab of the policy suites: a server on each node, and four clients that policies distinguish.

use std::time::Duration;

use anyhow::Result;
use lab::{Lab, Options};
use serde_json::{Map, Value, json};

use crate::manifest::{self, Pod};
use crate::programs::{greeter, words};

/// The servers' port for HTTP, named `http`. nginx responds with the client address that it sees.
pub const HTTP: u16 = 8080;

/// The servers' port on which the server sends first, named `tcp-echo`.
pub const TCP: u16 = 9000;

/// The greeting that a server sends on [`TCP`].
pub const GREETING: &str = "hello";

/// Size in bytes of the file `/big` of each server. nginx limits its rate, so that a transfer takes
/// five seconds.
pub const BIG_FILE_BYTES: usize = 5 * BIG_FILE_BYTES_PER_SECOND;
const BIG_FILE_BYTES_PER_SECOND: usize = 128 * 1024;

/// A client of another namespace in the mesh, on node `a`.
pub const PRODUCTPAGE: &str = "default/productpage";

/// A client of the servers' own namespace, on node `a`, with the label `role: frontend`.
pub const FOO: &str = "foo/curl";

/// A client of another namespace in the mesh, on node `b`, with the label `type: monitoring`. Its
/// namespace has the label `purpose: production`.
pub const BAR: &str = "bar/curl";

/// A client on node `a` that is not in the mesh.
pub const LEGACY: &str = "legacy/curl";

/// All clients.
pub const CLIENTS: [&str; 4] = [PRODUCTPAGE, FOO, BAR, LEGACY];

/// The servers with their nodes.
pub const SERVERS: [(&str, &str); 2] = [("foo/near", "a"), ("foo/far", "b")];

/// How long a server may take to listen. A pod is ready when its program runs, and that program
/// first writes a file.
const LISTEN_DEADLINE: Duration = Duration::from_secs(10);

/// Brings up the lab.
///
/// # Errors
/// The lab does not come up.
pub fn up() -> Result<Lab> {
    up_with([], Options::default())
}

/// Brings up the lab with more objects and other options.
///
/// # Errors
/// The lab does not come up.
pub fn up_with(more: impl IntoIterator<Item = String>, options: Options) -> Result<Lab> {
    let lab = Lab::up(manifest::all(manifests().into_iter().chain(more)), options)?;
    for (server, _) in SERVERS {
        lab.wait_until(&format!("{server} to listen"), LISTEN_DEADLINE, || {
            let sockets = lab.exec(server, &["ss", "-Hltn"]).ok()?.stdout;
            let is_listening = |port: u16| sockets.contains(&format!(":{port} "));
            (is_listening(HTTP) && is_listening(TCP)).then_some(())
        })?;
    }
    Ok(lab)
}

fn manifests() -> Vec<String> {
    let ambient = ("istio.io/dataplane-mode", "ambient");
    let mut all = vec![
        manifest::two_nodes(),
        namespace("istio-system", &[]),
        namespace("default", &[ambient]),
        namespace("foo", &[ambient, ("purpose", "development")]),
        namespace("bar", &[ambient, ("purpose", "production")]),
        namespace("legacy", &[]),
        Pod::new("default", "productpage").on("a").into(),
        Pod::new("foo", "curl")
            .on("a")
            .label("role", "frontend")
            .into(),
        Pod::new("bar", "curl")
            .on("b")
            .label("type", "monitoring")
            .into(),
        Pod::new("legacy", "curl").on("a").into(),
    ];
    for (server, node) in SERVERS {
        all.push(server_pod(&server["foo/".len()..], node).into());
    }
    all
}

/// A server with both ports, in namespace `foo`, with the label `app: httpbin`.
fn server_pod(name: &str, node: &str) -> Pod {
    Pod::new("foo", name)
        .on(node)
        .label("app", "httpbin")
        .runs(server_command())
        .port(Some("http"), HTTP)
        .port(Some("tcp-echo"), TCP)
}

/// nginx on [`HTTP`] and a greeter on [`TCP`]. nginx responds with the client address that it sees,
/// and logs that address with each request.
fn server_command() -> Vec<String> {
    let config = format!(
        "daemon off; master_process off; pid nginx.pid; error_log /dev/stderr;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
           log_format e2e '$remote_addr $server_port $request_uri';\n\
           access_log /dev/stdout e2e;\n\
           server {{\n\
             listen {HTTP} backlog=1024; listen [::]:{HTTP} backlog=1024; default_type text/plain;\n\
             location / {{ return 200 \"$remote_addr\"; }}\n\
             location /big {{ root www; limit_rate {BIG_FILE_BYTES_PER_SECOND}; }}\n\
           }}\n\
         }}\n"
    );
    let greeter: Vec<String> = greeter(TCP, GREETING)
        .iter()
        .map(|word| format!("'{word}'"))
        .collect();
    let script = format!(
        "mkdir www && seq {BIG_FILE_BYTES} | head -c {BIG_FILE_BYTES} >www/big && \
         printf %s \"$0\" >nginx.conf || exit 1\n\
         {} &\n\
         exec nginx -e /dev/stderr -p \"$PWD\" -c nginx.conf",
        greeter.join(" ")
    );
    words(&["sh", "-c", &script, &config])
}

/// The content of the file `/big`: the first [`BIG_FILE_BYTES`] bytes of the numbers from 1, one a
/// line.
pub fn big_file() -> Vec<u8> {
    let lines = (1..=BIG_FILE_BYTES).flat_map(|number| format!("{number}\n").into_bytes());
    lines.take(BIG_FILE_BYTES).collect()
}

/// A namespace with these labels and the name label that Kubernetes sets on every namespace.
fn namespace(name: &str, labels: &[(&str, &str)]) -> String {
    let name_label = ("kubernetes.io/metadata.name", name);
    let labels: Map<String, Value> = labels
        .iter()
        .chain([&name_label])
        .map(|(key, value)| ((*key).to_owned(), (*value).into()))
        .collect();
    let metadata = json!({"name": name, "labels": labels});
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}).to_string()
}
