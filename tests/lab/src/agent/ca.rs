//! The certificate authority as a process: its address, its arguments, the tokens of the nodes.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use tokio::process::Command;

use super::LabContext;
use super::publish::write_atomically;
use crate::model::topology;
use crate::netns;
use crate::registry::LabDir;
use crate::tools::run_async;

/// Istio's port of the certificate service.
const PORT: u16 = 15012;

/// The state of a listening socket in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// The address of the fabric, which is outside the cluster and every node's default gateway.
pub(super) fn address() -> SocketAddr {
    (topology::FABRIC_V4, PORT).into()
}

/// Adds the arguments of the certificate authority.
pub(super) fn add_arguments(command: &mut Command, dir: &LabDir) {
    command
        .arg("ca")
        .arg("--dir")
        .arg(dir.ca())
        .args(["--listen", &address().to_string()])
        .arg("--token-key")
        .arg(dir.token_public_key());
}

/// Adds the arguments with which a node's daemon uses the certificate authority.
pub(super) fn add_daemon_arguments(command: &mut Command, dir: &LabDir, node: &str) {
    command
        .args(["--ca-address", &address().to_string()])
        .arg("--ca-root-cert")
        .arg(dir.ca_bundle())
        .arg("--ca-token")
        .arg(dir.token(node));
}

/// Creates the key pair with which tokens are signed and checked.
pub(super) async fn create_token_keys(context: &LabContext) -> Result<()> {
    let (private, public) = (context.dir.token_key(), context.dir.token_public_key());
    let arguments = [
        "ca-key",
        "--private-key",
        &*private.to_string_lossy(),
        "--public-key",
        &*public.to_string_lossy(),
    ];
    run_ambit(context, &arguments).await.map(drop)
}

/// Signs the token of a node. It is valid for longer than any lab runs.
pub(super) async fn sign_token(context: &LabContext, node: &str) -> Result<()> {
    let key = context.dir.token_key();
    let arguments = [
        "ca-token",
        "--key",
        &*key.to_string_lossy(),
        "--impersonate",
        "*/*",
        "--ttl",
        "24h",
    ];
    let token = run_ambit(context, &arguments).await?;
    write_atomically(
        &context.dir,
        &context.dir.token(node),
        token.trim().as_bytes(),
    )
}

async fn run_ambit(context: &LabContext, arguments: &[&str]) -> Result<String> {
    let binary = context
        .ambit
        .as_ref()
        .context("this lab runs without a certificate authority")?;
    let binary = binary.to_string_lossy();
    run_async(&[&[&*binary], arguments].concat(), "").await
}

/// Whether a socket listens on the port. This does not connect: the certificate authority would
/// log a client that fails its handshake.
pub(super) async fn is_listening(fabric: &str) -> bool {
    let suffix = format!(":{PORT:04X}");
    let read = || std::fs::read_to_string("/proc/thread-self/net/tcp");
    let Ok(Ok(sockets)) = netns::run_in_async(fabric, read).await else {
        return false;
    };
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&suffix)) && fields.nth(1) == Some(LISTEN)
    })
}
