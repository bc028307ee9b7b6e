//! nftables in the network namespace of the calling thread: scripts through `nft`, which applies
//! each as one transaction, and the ruleset's generation from the kernel itself, which tells for
//! the price of one system call whether anything has changed.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::SockProtocol;

use crate::netlink::Netlink;

/// How long one `nft` may run. It takes 15 ms to replace a pod's table, 3 ms to list it, and 0.8 s to
/// fill a set with 100,000 addresses.
const DEADLINE: Duration = Duration::from_secs(5);

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN` (`linux/netfilter/nfnetlink.h`, `nf_tables.h`).
const GET_GENERATION: u16 = 10 << 8 | 16;
/// `NFTA_GEN_ID`: the generation, big-endian.
const GENERATION_ID: u16 = 1;
/// `NFNLGRP_NFTABLES`: the multicast group that hears of every transaction.
pub(crate) const GROUP: u32 = 7;

/// Why nftables did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is missing or the namespace is gone.
    #[error("cannot run nft: is nftables installed?")]
    Run(#[source] io::Error),
    /// It did not end in time and was killed.
    #[error("nft did not end within {DEADLINE:?}")]
    Deadline,
    /// It refused; nothing of the script was applied.
    #[error("nft refused the rules: {0}")]
    Refused(String),
    /// A table that was put in place was not there a moment later.
    #[error("the table vanished right after it was put in place: who else changes rules here?")]
    Vanished,
    /// Each time the rules were put in place, somebody else changed something before they were read back.
    #[error("the rules could not be read back alone: who else changes rules here all the time?")]
    Unsettled,
    /// The kernel did not tell the generation.
    #[error("cannot ask the kernel for the generation of its ruleset")]
    Generation(#[source] io::Error),
}

/// Applies a script: all of it or nothing.
pub(crate) fn apply(script: &str) -> Result<(), Error> {
    let output = nft(&["-f", "-"], script)?;
    if output.success {
        Ok(())
    } else {
        Err(Error::Refused(first_lines(&output.stderr)))
    }
}

/// The listing of one `inet` table, or nothing if there is no such table. Handles and counters are left
/// out, so that two listings are equal if and only if the rules are.
pub(crate) fn list(table: &str) -> Result<Option<String>, Error> {
    let output = nft(&["-s", "list", "table", "inet", table], "")?;
    if output.success {
        Ok(Some(output.stdout))
    } else if output.stderr.contains("No such file") {
        Ok(None)
    } else {
        Err(Error::Refused(first_lines(&output.stderr)))
    }
}

/// How often rules are put in place anew because somebody else changed something meanwhile.
const ATTEMPTS: usize = 5;

/// Applies a script and tells how the kernel lists `table` then, and the generation of that. What
/// somebody else changes in between must not pass for what was applied, or it would never be
/// repaired: nothing else may have happened between the generation before and the one after.
pub(crate) fn apply_alone(script: &str, table: &str) -> Result<(u32, String), Error> {
    for _ in 0..ATTEMPTS {
        let before = generation()?;
        apply(script)?;
        let listing = list(table)?;
        let after = generation()?;
        if let (Some(listing), true) = (listing, after == before.wrapping_add(1)) {
            return Ok((after, listing));
        }
    }
    Err(Error::Unsettled)
}

/// How the kernel lists `table` when nobody but this script has changed anything: asked in a network
/// namespace that nobody else knows, and that ends with the question.
pub(crate) fn listing_of(script: &str, table: &str) -> Result<String, Error> {
    let ask = || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| Error::Run(error.into()))?;
        apply(script)?;
        list(table)?.ok_or(Error::Vanished)
    };
    // A thread of its own, which never comes back from there.
    let panicked = |_| Err(Error::Run(io::ErrorKind::Other.into()));
    thread::scope(|scope| scope.spawn(ask).join().unwrap_or_else(panicked))
}

/// The generation of the namespace's ruleset, which every transaction raises. It stays 1 while
/// nobody has used nftables.
pub(crate) fn generation() -> Result<u32, Error> {
    let ask = || -> io::Result<u32> {
        let mut generation = None;
        // struct nfgenmsg: family, version, resource id.
        Netlink::open(SockProtocol::NetlinkNetFilter)?.call(
            GET_GENERATION,
            crate::netlink::CHANGE,
            &[0; 4],
            |_, payload| generation = generation.or_else(|| generation_in(payload.get(4..)?)),
        )?;
        generation.ok_or_else(|| io::ErrorKind::InvalidData.into())
    };
    ask().map_err(Error::Generation)
}

fn generation_in(mut attributes: &[u8]) -> Option<u32> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        if kind == GENERATION_ID {
            return Some(u32::from_be_bytes(value.try_into().ok()?));
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

struct Output {
    success: bool,
    stdout: String,
    stderr: String,
}

/// Runs `nft` with `input`. The child inherits the namespace of this thread. Its input is a file in
/// memory and not a pipe, so that a child that does not read cannot hold the caller.
fn nft(arguments: &[&str], input: &str) -> Result<Output, Error> {
    let mut stdin = File::from(
        memfd_create(c"nft", MFdFlags::MFD_CLOEXEC).map_err(|error| Error::Run(error.into()))?,
    );
    stdin
        .write_all(input.as_bytes())
        .and_then(|()| stdin.rewind())
        .map_err(Error::Run)?;
    let mut child = Command::new("nft")
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::Run)?;
    let output = collect(&mut child, Instant::now() + DEADLINE);
    if output.is_err() {
        // Already dead is as good as killed.
        let _ = child.kill();
    }
    let status = child.wait().map_err(Error::Run)?;
    let (stdout, stderr) = output?;
    Ok(Output {
        success: status.success(),
        stdout,
        stderr,
    })
}

/// Reads both outputs to their end, which is the child's.
fn collect(child: &mut Child, deadline: Instant) -> Result<(String, String), Error> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let (Some(mut out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(Error::Run(io::ErrorKind::BrokenPipe.into()));
    };
    let (mut out_open, mut err_open) = (true, true);
    while out_open || err_open {
        let left = deadline.saturating_duration_since(Instant::now());
        let events = |open| {
            if open {
                PollFlags::POLLIN
            } else {
                PollFlags::empty()
            }
        };
        let mut fds = [
            PollFd::new(out.as_fd(), events(out_open)),
            PollFd::new(err.as_fd(), events(err_open)),
        ];
        let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let ready = match poll(&mut fds, wait) {
            Ok(ready) => ready,
            // A signal for another part of the process.
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(Error::Run(error.into())),
        };
        if ready == 0 && left.is_zero() {
            return Err(Error::Deadline);
        }
        let [out_ready, err_ready] = fds.map(|fd| fd.any().unwrap_or(false));
        if out_open && out_ready {
            out_open = read_some(&mut out, &mut stdout)?;
        }
        if err_open && err_ready {
            err_open = read_some(&mut err, &mut stderr)?;
        }
    }
    Ok((
        String::from_utf8_lossy(&stdout).into_owned(),
        String::from_utf8_lossy(&stderr).into_owned(),
    ))
}

/// Whether there may be more.
fn read_some(from: &mut impl Read, into: &mut Vec<u8>) -> Result<bool, Error> {
    let mut chunk = [0; 16 * 1024];
    let read = from.read(&mut chunk).map_err(Error::Run)?;
    into.extend_from_slice(chunk.get(..read).unwrap_or_default());
    Ok(read > 0)
}

/// What nft says at length begins with what matters; the line of the script that it cites may be long.
fn first_lines(message: &str) -> String {
    const MOST: usize = 200;
    let lines = message
        .lines()
        .take(2)
        .map(|line| line.trim().chars().take(MOST).collect::<String>());
    lines.collect::<Vec<_>>().join(" ")
}
