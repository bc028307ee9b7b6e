//! A node's mesh daemon: its arguments, its readiness, the state in which it reports a pod.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::process::Command;

use super::{LabContext, ca};
use crate::http;
use crate::netns;
use crate::options::IdentitySource;

/// The ports of a daemon's admin server and of its readiness probe.
const ADMIN_PORT: u16 = 15000;
const READINESS_PORT: u16 = 15021;

/// Timeout of a request to a daemon.
pub(super) const RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Adds the arguments of a node's daemon.
pub(super) fn add_arguments(command: &mut Command, context: &LabContext, node: &str) {
    let dir = &context.dir;
    command
        .args(["--node-name", node])
        .arg("--source-folder")
        .arg(dir.objects())
        .arg("--netns-dir")
        .arg(dir.netns_dir());
    match &context.options.identity {
        IdentitySource::Folder => {
            command.arg("--ca-dir").arg(dir.ca());
        }
        IdentitySource::Ca => ca::add_daemon_arguments(command, dir, node),
        IdentitySource::Spire(socket) => {
            command.arg("--spire-socket").arg(socket);
        }
        IdentitySource::Custom => {}
    }
    command.args(&context.options.daemon_args);
}

/// Whether the daemon returns 200 on its readiness port.
pub(super) async fn is_ready(node_netns: &str) -> bool {
    let response = get(node_netns, READINESS_PORT, "/healthz/ready").await;
    response.is_some_and(|response| response.status == 200)
}

/// The state in which the node's daemon reports a pod; `None` if it does not report the pod.
pub(super) async fn workload_state(node_netns: &str, kube_uid: &str) -> Option<String> {
    let response = get(node_netns, ADMIN_PORT, "/config_dump").await?;
    let dump = serde_json::from_str(&response.body).ok()?;
    http::workload_state(&dump, kube_uid).map(str::to_owned)
}

async fn get(node_netns: &str, port: u16, path: &'static str) -> Option<http::Response> {
    let get = move || {
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        http::get(to, path, &[], RESPONSE_TIMEOUT)
    };
    netns::run_in_async(node_netns, get).await.ok()?.ok()
}
