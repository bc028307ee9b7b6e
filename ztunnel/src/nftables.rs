//! nftables in the network namespace of the calling thread.
//!
//! Scripts and listings go through `nft`, which applies each script as one transaction. The
//! ruleset's generation comes from the kernel by one system call and shows whether anything has
//! changed.

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

use crate::netlink::{ACK, Netlink};

/// How long one `nft` may run. Replacing a pod's table takes 15 ms, listing it 3 ms, and filling a
/// set with 100,000 addresses 0.8 s.
const DEADLINE: Duration = Duration::from_secs(5);

/// Largest output of `nft` that is read. The listing of a guard of a million pods takes 20 MB;
/// anything larger has content from elsewhere.
const MAX_OUTPUT_BYTES: usize = 64 * 1024 * 1024;

/// How often to check whether an `nft` that has closed its outputs has exited.
const EXIT_POLL: Duration = Duration::from_millis(2);

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN` (`linux/netfilter/nfnetlink.h`, `nf_tables.h`).
const GET_GENERATION: u16 = 10 << 8 | 16;
/// `NFTA_GEN_ID`: the generation, big-endian.
const GENERATION_ATTRIBUTE: u16 = 1;
/// `NFNLGRP_NFTABLES`: the multicast group that is notified of every transaction.
pub(crate) const MULTICAST_GROUP: u32 = 7;

/// Why rules could not be applied or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `nft` could not be run: the program is missing, or the system refused a process.
    #[error("cannot run nft: is nftables installed?")]
    Run(#[source] io::Error),
    /// `nft` did not exit in time and was killed.
    #[error("nft did not exit within {DEADLINE:?}")]
    Deadline,
    /// `nft` printed more than the daemon's own rules can account for, and was killed.
    #[error(
        "nft printed more than {MAX_OUTPUT_BYTES} bytes: does another program add to the daemon's \
         table?"
    )]
    OutputTooLarge,
    /// `nft` refused the script. None of it was applied.
    #[error("nft refused the rules: {0}")]
    Refused(String),
    /// A table was missing right after it was applied.
    #[error(
        "the table vanished right after it was applied: does another program change the rules here?"
    )]
    Vanished,
    /// Each time the rules were applied, another program changed the ruleset before they were read
    /// back.
    #[error(
        "the rules changed between applying and reading them, {MAX_ATTEMPTS} times in a row: \
         does another program change the rules here all the time?"
    )]
    ConcurrentChanges,
    /// The kernel did not return the generation.
    #[error("cannot read the generation of the ruleset from the kernel")]
    Generation(#[source] io::Error),
}

impl Error {
    /// Whether a listing failed because the table holds far more than the daemon put into it.
    pub(crate) fn is_oversized_listing(&self) -> bool {
        matches!(self, Self::Deadline | Self::OutputTooLarge)
    }
}

/// Applies a script as one transaction: all of it or nothing.
pub(crate) fn apply(script: &str) -> Result<(), Error> {
    let output = nft(&["-f", "-"], script)?;
    if output.success {
        Ok(())
    } else {
        Err(Error::Refused(first_lines(&output.stderr)))
    }
}

/// Listing of an `inet` table, or `None` if there is no such table. It has neither handles nor
/// counter values, so that two listings are equal if and only if the rules are.
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

/// Packets that a named counter of an `inet` table has counted since the table was created, or
/// `None` if there is no such counter.
pub(crate) fn counter_packets(table: &str, counter: &str) -> Result<Option<u64>, Error> {
    let output = nft(&["list", "counter", "inet", table, counter], "")?;
    if output.success {
        Ok(parse_counter(&output.stdout))
    } else if output.stderr.contains("No such file") {
        Ok(None)
    } else {
        Err(Error::Refused(first_lines(&output.stderr)))
    }
}

fn parse_counter(listing: &str) -> Option<u64> {
    let mut words = listing.split_whitespace();
    words.find(|word| *word == "packets")?;
    words.next()?.parse().ok()
}

/// How often rules are applied again because another program changed the ruleset in between.
const MAX_ATTEMPTS: usize = 5;

/// Applies a script and returns the resulting generation and listing of `table`. A concurrent
/// change by another program must not be taken for what was applied, or it would never be repaired.
/// The generations before and after show that there was none.
pub(crate) fn apply_and_list(script: &str, table: &str) -> Result<(u32, String), Error> {
    for _ in 0..MAX_ATTEMPTS {
        let before = generation()?;
        apply(script)?;
        let listing = list(table)?;
        let after = generation()?;
        if let (Some(listing), true) = (listing, after == before.wrapping_add(1)) {
            return Ok((after, listing));
        }
    }
    Err(Error::ConcurrentChanges)
}

/// How the kernel lists `table` after this script and nothing else, determined in a new network
/// namespace that no other program can reach and that ends with the call.
pub(crate) fn list_in_scratch_netns(script: &str, table: &str) -> Result<String, Error> {
    let apply_and_list = || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| Error::Run(error.into()))?;
        apply(script)?;
        list(table)?.ok_or(Error::Vanished)
    };
    // A thread of its own, which ends in that namespace.
    let panicked = |_| Err(Error::Run(io::ErrorKind::Other.into()));
    thread::scope(|scope| scope.spawn(apply_and_list).join().unwrap_or_else(panicked))
}

/// Generation of the namespace's ruleset, which every transaction increments. It is 1 until
/// nftables is used for the first time.
pub(crate) fn generation() -> Result<u32, Error> {
    let request = || -> io::Result<u32> {
        let mut generation = None;
        // struct nfgenmsg: family, version, resource id.
        Netlink::open(SockProtocol::NetlinkNetFilter)?.request(
            GET_GENERATION,
            ACK,
            &[0; 4],
            |_, payload| generation = generation.or_else(|| parse_generation(payload.get(4..)?)),
        )?;
        generation.ok_or_else(|| io::ErrorKind::InvalidData.into())
    };
    request().map_err(Error::Generation)
}

/// Finds the generation among netlink attributes.
fn parse_generation(mut attributes: &[u8]) -> Option<u32> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        if kind == GENERATION_ATTRIBUTE {
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

/// Runs `nft` with `input`, for [`DEADLINE`] at most. The child inherits the namespace of this
/// thread. Its input is a file in memory instead of a pipe, so that a child that does not read
/// cannot block the caller.
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
    let output = read_outputs(&mut child, deadline).and_then(|output| {
        wait_for_exit(&mut child, deadline)?;
        Ok(output)
    });
    if output.is_err() {
        // The child may have exited already.
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

/// Waits for the exit of a child that has closed its outputs.
fn wait_for_exit(child: &mut Child, deadline: Instant) -> Result<(), Error> {
    while child.try_wait().map_err(Error::Run)?.is_none() {
        if Instant::now() >= deadline {
            return Err(Error::Deadline);
        }
        // A sleep: there is no descriptor to poll.
        let _ = poll(
            &mut [],
            PollTimeout::try_from(EXIT_POLL).unwrap_or(PollTimeout::ZERO),
        );
    }
    Ok(())
}

/// Reads standard output and standard error to their ends.
fn read_outputs(child: &mut Child, deadline: Instant) -> Result<(String, String), Error> {
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
            // A signal was delivered to this thread: poll again.
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
        if stdout.len() + stderr.len() > MAX_OUTPUT_BYTES {
            return Err(Error::OutputTooLarge);
        }
    }
    Ok((
        String::from_utf8_lossy(&stdout).into_owned(),
        String::from_utf8_lossy(&stderr).into_owned(),
    ))
}

/// Reads what is available. Returns false at the end of the stream.
fn read_some(from: &mut impl Read, into: &mut Vec<u8>) -> Result<bool, Error> {
    let mut chunk = [0; 16 * 1024];
    let read = from.read(&mut chunk).map_err(Error::Run)?;
    into.extend_from_slice(chunk.get(..read).unwrap_or_default());
    Ok(read > 0)
}

/// The first two lines of an error of `nft`, which describe the mistake. The script line that it
/// quotes may be long and is cut.
fn first_lines(message: &str) -> String {
    const MAX_LINE_CHARS: usize = 200;
    let lines = message
        .lines()
        .take(2)
        .map(|line| line.trim().chars().take(MAX_LINE_CHARS).collect::<String>());
    lines.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_shell(script: &str) -> Result<Output, Error> {
        let stdin = File::open("/dev/null").expect("/dev/null");
        run(Command::new("sh").args(["-c", script]), stdin)
    }

    #[test]
    fn both_outputs_are_read_to_their_ends() {
        let output = run_shell("echo out; echo err >&2; exit 3").expect("the shell exits");
        assert_eq!(
            (output.stdout.as_str(), output.stderr.as_str()),
            ("out\n", "err\n")
        );
        assert!(!output.success);
    }

    #[test]
    fn child_with_endless_output_is_killed() {
        let start = Instant::now();
        let error = run_shell("exec yes").err().expect("it never exits");
        assert!(error.is_oversized_listing(), "{error}");
        assert!(start.elapsed() < 3 * DEADLINE);
    }

    #[test]
    fn silent_child_is_killed_at_the_deadline() {
        for script in ["exec sleep 60", "exec sleep 60 >&- 2>&-"] {
            let error = run_shell(script).err().expect("it does not exit in time");
            assert!(matches!(error, Error::Deadline), "{script}: {error}");
        }
    }

    #[test]
    fn counter_is_parsed_from_its_listing() {
        let listing = "table inet t {\n\tcounter plaintext {\n\t\tpackets 12 bytes 720\n\t}\n}\n";
        assert_eq!(parse_counter(listing), Some(12));
        assert_eq!(parse_counter("table inet t {\n}\n"), None);
    }
}
