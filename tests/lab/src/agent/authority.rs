//! The certificate authority as a process: where it listens, what it and the daemons are told of it.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};
use rcgen::KeyPair;
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
        .arg(dir.ca().join("root-cert.pem"))
        .arg("--ca-token")
        .arg(dir.token(node))
}

/// Makes what tokens are signed and checked with.
pub(super) fn prepare(dir: &LabDir) -> Result<()> {
    let pair = KeyPair::generate().context("the key of tokens")?;
    let mut key = OpenOptions::new();
    let key = key.write(true).create_new(true).mode(0o600);
    let key = key.open(dir.token_key());
    key.and_then(|mut file| file.write_all(pair.serialize_pem().as_bytes()))
        .and_then(|()| fs::write(dir.token_public_key(), pair.public_key_pem()))
        .context("the key of tokens")
}

/// Signs the token of a node.
pub(super) async fn mint(world: &World, node: &str) -> Result<()> {
    let (dir, ambit) = (&world.dir, &world.ambit);
    let ambit = ambit.as_ref().context("this lab has no authority")?;
    let (ambit, key) = (ambit.to_string_lossy(), dir.token_key());
    let command = [
        &*ambit,
        "ca-token",
        "--key",
        &*key.to_string_lossy(),
        "--subject",
        node,
    ];
    let token = run_async(&command, "").await.context("a token")?;
    write_atomically(dir, &dir.token(node), token.trim().as_bytes())
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
