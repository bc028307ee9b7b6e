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

/// The most that `nft` may say. A guard that knows a million pods is listed in 20 MB; more is not ours.
const OUTPUT: usize = 64 * 1024 * 1024;

/// How often it is looked whether an `nft` that has said everything has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

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
    /// It said more than any rules of ours could make it say, and was killed.
    #[error("nft said more than {OUTPUT} bytes: who else puts things into our table?")]
    TooMuch,
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

impl Error {
    /// Whether a listing failed because there is more in the table than was put there by us.
    pub(crate) fn is_of_size(&self) -> bool {
        matches!(self, Self::Deadline | Self::TooMuch)
    }
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

/// The packets that a named counter of an `inet` table has counted since the table was made; nothing if
/// there is no such counter.
pub(crate) fn packets(table: &str, counter: &str) -> Result<Option<u64>, Error> {
    let output = nft(&["list", "counter", "inet", table, counter], "")?;
    if output.success {
        Ok(packets_in(&output.stdout))
    } else if output.stderr.contains("No such file") {
        Ok(None)
    } else {
        Err(Error::Refused(first_lines(&output.stderr)))
    }
}

fn packets_in(listing: &str) -> Option<u64> {
    let mut words = listing.split_whitespace();
    words.find(|word| *word == "packets")?;
    words.next()?.parse().ok()
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

/// Runs `nft` with `input`. It ends by [`DEADLINE`], whatever it does. The child inherits the namespace of this thread. Its input is a file in
/// memory and not a pipe, so that a child that does not read cannot hold the caller.
fn nft(arguments: &[&str], input: &str) -> Result<Output, Error> {
    let mut stdin = File::from(
        memfd_create(c"nft", MFdFlags::MFD_CLOEXEC).map_err(|error| Error::Run(error.into()))?,
    );
    stdin
        .write_all(input.as_bytes())
        .and_then(|()| stdin.rewind())
        .map_err(Error::Run)?;
    run(Command::new("nft").args(arguments), stdin)
}

fn run(command: &mut Command, stdin: File) -> Result<Output, Error> {
    let mut child = command
        .env("LC_ALL", "C")
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::Run)?;
    let deadline = Instant::now() + DEADLINE;
    let output = collect(&mut child, deadline).and_then(|output| {
        ends(&mut child, deadline)?;
        Ok(output)
    });
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

/// Waits for the end of a child that has closed its outputs, which is what is left of it.
fn ends(child: &mut Child, deadline: Instant) -> Result<(), Error> {
    while child.try_wait().map_err(Error::Run)?.is_none() {
        if Instant::now() >= deadline {
            return Err(Error::Deadline);
        }
        // Nothing to wait for but the time.
        let _ = poll(
            &mut [],
            PollTimeout::try_from(LOOK_AGAIN).unwrap_or(PollTimeout::ZERO),
        );
    }
    Ok(())
}

/// Reads both outputs to their end.
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
        match poll(&mut fds, wait) {
            // A signal for another part of the process interrupts nothing.
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Error::Run(error.into())),
        }
        if left.is_zero() {
            return Err(Error::Deadline);
        }
        let [out_ready, err_ready] = fds.map(|fd| fd.any().unwrap_or(false));
        if out_open && out_ready {
            out_open = read_some(&mut out, &mut stdout)?;
        }
        if err_open && err_ready {
            err_open = read_some(&mut err, &mut stderr)?;
        }
        if stdout.len() + stderr.len() > OUTPUT {
            return Err(Error::TooMuch);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn said(script: &str) -> Result<Output, Error> {
        let stdin = File::open("/dev/null").expect("it is always there");
        run(Command::new("sh").args(["-c", script]), stdin)
    }

    #[test]
    fn what_a_child_says_is_taken_to_its_end() {
        let output = said("echo out; echo err >&2; exit 3").expect("it ends");
        assert_eq!(
            (output.stdout.as_str(), output.stderr.as_str()),
            ("out\n", "err\n")
        );
        assert!(!output.success);
    }

    #[test]
    fn a_child_that_speaks_without_end_is_killed() {
        let begun = Instant::now();
        let error = said("exec yes").err().expect("it never ends");
        assert!(error.is_of_size(), "{error}");
        assert!(begun.elapsed() < 3 * DEADLINE);
    }

    #[test]
    fn a_child_that_neither_speaks_nor_ends_is_killed_at_the_deadline() {
        for script in ["exec sleep 60", "exec sleep 60 >&- 2>&-"] {
            let error = said(script).err().expect("it does not end");
            assert!(matches!(error, Error::Deadline), "{script}: {error}");
        }
    }

    #[test]
    fn a_counter_is_read_from_its_listing() {
        let listing = "table inet t {\n\tcounter plaintext {\n\t\tpackets 12 bytes 720\n\t}\n}\n";
        assert_eq!(packets_in(listing), Some(12));
        assert_eq!(packets_in("table inet t {\n}\n"), None);
    }
}
