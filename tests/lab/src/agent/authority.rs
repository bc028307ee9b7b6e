//! The certificate authority as a process: where it listens, what it and the daemons are told of it.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use tokio::process::Command;

use super::World;
use super::publish::write_atomically;
use crate::model::topology;
use crate::netns;
use crate::registry::LabDir;
use crate::tools::run_async;

/// Istio's port of this protocol.
const PORT: u16 = 15012;

/// The state of a listening socket in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// Outside the cluster, where the default route of every node leads.
pub(crate) fn address() -> SocketAddr {
    (topology::FABRIC_V4, PORT).into()
}

pub(super) fn arguments(command: &mut Command, dir: &LabDir) {
    command
        .arg("ca")
        .arg("--dir")
        .arg(dir.ca())
        .args(["--listen", &address().to_string()])
        .arg("--token-key")
        .arg(dir.token_public_key());
}

pub(super) fn daemon_arguments<'a>(
    command: &'a mut Command,
    dir: &LabDir,
    node: &str,
) -> &'a mut Command {
    command
        .args(["--ca-address", &address().to_string()])
        .arg("--ca-root-cert")
        .arg(dir.ca_bundle())
        .arg("--ca-token")
        .arg(dir.token(node))
}

/// Makes what tokens are signed and checked with.
pub(super) async fn prepare(world: &World) -> Result<()> {
    let (private, public) = (world.dir.token_key(), world.dir.token_public_key());
    let keys = [
        "ca-key",
        "--private-key",
        &*private.to_string_lossy(),
        "--public-key",
        &*public.to_string_lossy(),
    ];
    ambit(world, &keys).await.map(drop)
}

/// Signs the token of a node, which holds for longer than any lab lives.
pub(super) async fn mint(world: &World, node: &str) -> Result<()> {
    let key = world.dir.token_key();
    let token = [
        "ca-token",
        "--key",
        &*key.to_string_lossy(),
        "--impersonate",
        "*/*",
        "--ttl",
        "24h",
    ];
    let token = ambit(world, &token).await?;
    write_atomically(&world.dir, &world.dir.token(node), token.trim().as_bytes())
}

async fn ambit(world: &World, arguments: &[&str]) -> Result<String> {
    let binary = world.ambit.as_ref().context("this lab has no authority")?;
    let binary = binary.to_string_lossy();
    run_async(&[&[&*binary], arguments].concat(), "").await
}

/// Whether something listens on its port. Nothing connects for that, which an authority would take
/// for a client that does not shake hands.
pub(super) async fn listens(fabric: &str) -> bool {
    let suffix = format!(":{PORT:04X}");
    let read = || std::fs::read_to_string("/proc/thread-self/net/tcp");
    let Ok(Ok(sockets)) = netns::inside_async(fabric, read).await else {
        return false;
    };
    sockets.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&suffix)) && words.nth(1) == Some(LISTEN)
    })
}
