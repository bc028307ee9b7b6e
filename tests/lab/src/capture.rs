//! What really crosses the wire, seen by tcpdump.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::net::if_::if_nametoindex;
use nix::sys::signal::Signal;

use crate::model::topology::{FABRIC_BROADCAST_V4, GATEWAY_V4, GATEWAY_V6};
use crate::netns;
use crate::pcap;
use crate::poll;
use crate::process::{Process, contains};
use crate::tools;

/// tcpdump says that it listens within milliseconds, and writes a packet as fast.
const DEADLINE: Duration = Duration::from_secs(5);

/// The port of the packets that mark "everything before this has been recorded" (discard, RFC 863).
const SENTINEL_PORT: u16 = 9;

/// A place in the lab.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// The bridge between the nodes, and the namespace it is in: outside the cluster.
    Fabric,
    /// A node's own namespace. A capture sees all its interfaces: pods of one node, too.
    Node(String),
    /// A pod. A capture sees its eth0: what leaves and enters it.
    Pod(String),
}

impl Location {
    /// The node of this name.
    pub fn node(name: &str) -> Self {
        Self::Node(name.to_owned())
    }

    /// The pod of this name.
    pub fn pod(name: &str) -> Self {
        Self::Pod(name.to_owned())
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fabric => write!(f, "the fabric"),
            Self::Node(node) => write!(f, "node {node}"),
            Self::Pod(pod) => write!(f, "pod {pod}"),
        }
    }
}

/// A running recording. Every question is answered for all packets up to the moment it is asked.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Process,
    netns: String,
    place: Location,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

impl Capture {
    pub(crate) fn start(netns: String, place: Location, filter: &str) -> Result<Self> {
        tools::require("tcpdump", "tcpdump")?;
        let dir = tempfile::tempdir().context("cannot make a folder for a capture")?;
        let file = dir.path().join("pcap");
        // A bridge shows its own device what it forwards only while that is promiscuous.
        let interface: &[&str] = match place {
            Location::Fabric => &["-i", "br0"],
            Location::Node(_) => &["-p", "-i", "any"],
            Location::Pod(_) => &["-p", "-i", "eth0"],
        };
        let mut tcpdump = Command::new("ip");
        tcpdump
            .args(["netns", "exec", &netns, "tcpdump", "-n"])
            .args(interface);
        // Each packet is written at once, whole; 64 MiB of ring ride out a busy machine. Root stays
        // root, because the user tcpdump may not write here.
        tcpdump.args([
            "-U",
            "--immediate-mode",
            "-s",
            "0",
            "-B",
            "65536",
            "-Z",
            "root",
            "-w",
        ]);
        tcpdump.arg(&file);
        if !filter.is_empty() {
            tcpdump.arg(format!("({filter}) or (udp dst port {SENTINEL_PORT})"));
        }
        let tcpdump = Process::start(tcpdump)?;
        tcpdump
            .wait_stderr("listening on", DEADLINE)
            .with_context(|| format!("tcpdump in {place}"))?;
        Ok(Self {
            tcpdump,
            netns,
            place,
            file,
            _dir: dir,
        })
    }

    /// How often `marker` was seen: in the raw bytes of a packet, or across the packets of a TCP
    /// stream.
    ///
    /// # Errors
    /// The recording is not complete: tcpdump has died, or the kernel dropped packets.
    pub fn occurrences(&self, marker: impl AsRef<[u8]>) -> Result<usize> {
        Ok(pcap::occurrences(&self.recorded()?, marker.as_ref()))
    }

    /// How many packets were recorded.
    ///
    /// # Errors
    /// The recording is not complete.
    pub fn packets(&self) -> Result<usize> {
        let file = self.recorded()?;
        let packets = pcap::packets(&file)
            .map(|(_, packets)| packets)
            .unwrap_or_default();
        Ok(packets
            .iter()
            .filter(|packet| !contains(packet, SENTINEL))
            .count())
    }

    /// The TCP payload bytes to and from this port, each byte counted once.
    ///
    /// # Errors
    /// The recording is not complete.
    pub fn tcp_bytes(&self, port: u16) -> Result<usize> {
        let streams = pcap::streams(&self.recorded()?);
        let on_port = streams
            .iter()
            .filter(|s| s.from.port() == port || s.to.port() == port);
        Ok(on_port.map(|stream| stream.bytes.len()).sum())
    }

    /// Of the bytes to and from this port, those inside TLS records, and those of them that are
    /// encrypted application data (everything after the hellos, in TLS 1.3).
    ///
    /// # Errors
    /// The recording is not complete.
    pub fn tls_bytes(&self, port: u16) -> Result<(usize, usize)> {
        let streams = pcap::streams(&self.recorded()?);
        let on_port = streams
            .iter()
            .filter(|s| s.from.port() == port || s.to.port() == port);
        Ok(on_port
            .map(|s| pcap::tls(&s.bytes))
            .fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1)))
    }

    /// The recording itself, in pcap's format, complete up to now.
    ///
    /// # Errors
    /// tcpdump has died, or does not keep up.
    pub fn recorded(&self) -> Result<Vec<u8>> {
        let sentinel = self.send_sentinel()?;
        let complete = poll::until(DEADLINE, poll::OFTEN, || {
            let file = std::fs::read(&self.file).unwrap_or_default();
            contains(&file, &sentinel).then_some(file)
        });
        let file = complete.with_context(|| {
            format!(
                "tcpdump in {} does not record: {}",
                self.place,
                self.complaint()
            )
        })?;
        match self.dropped()? {
            0 => Ok(file),
            lost => bail!(
                "the recording in {} lacks {lost} packets that the kernel dropped",
                self.place
            ),
        }
    }

    /// How many packets the kernel dropped since the start because tcpdump did not keep up; it says
    /// so on SIGUSR1.
    fn dropped(&self) -> Result<u64> {
        let reports = || drop_reports(&self.complaint());
        let before = reports().len();
        self.tcpdump.signal(Signal::SIGUSR1);
        let fresh = poll::until(DEADLINE, poll::OFTEN, || {
            let reports = reports();
            (reports.len() > before)
                .then(|| reports.last().copied())
                .flatten()
        });
        fresh.with_context(|| {
            format!(
                "tcpdump in {} does not say what it lost: {}",
                self.place,
                self.complaint()
            )
        })
    }

    /// A packet with a number of its own: once it is in the file, so is all that came before it.
    fn send_sentinel(&self) -> Result<Vec<u8>> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut payload = SENTINEL.to_vec();
        payload.extend_from_slice(format!("{}-{number};", std::process::id()).as_bytes());
        let place = self.place.clone();
        let sent = netns::inside(&self.netns, || send(&place, &payload))?;
        sent.with_context(|| format!("cannot mark the recording in {}", self.place))?;
        Ok(payload)
    }

    fn complaint(&self) -> String {
        String::from_utf8_lossy(&self.tcpdump.stderr()).into_owned()
    }
}

/// The numbers in tcpdump's lines `N packets dropped by kernel`, whole lines only.
fn drop_reports(said: &str) -> Vec<u64> {
    let lines = said
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    let number = |line: &str| {
        let (before, _) = line
            .split_once(" packets dropped by kernel")
            .or_else(|| line.split_once(" packet dropped by kernel"))?;
        before.rsplit(' ').next()?.parse().ok()
    };
    lines.filter_map(number).collect()
}

/// Sends to some address whose packets cross the recorded interface; nobody needs to listen there.
fn send(place: &Location, payload: &[u8]) -> io::Result<usize> {
    let to = match place {
        Location::Fabric => FABRIC_BROADCAST_V4,
        Location::Node(_) => Ipv4Addr::LOCALHOST,
        Location::Pod(_) => GATEWAY_V4,
    };
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_broadcast(true)?;
    match socket.send_to(payload, (to, SENTINEL_PORT)) {
        // A pod without IPv4.
        Err(_) if matches!(place, Location::Pod(_)) => {
            let to = SocketAddrV6::new(GATEWAY_V6, SENTINEL_PORT, 0, if_nametoindex("eth0")?);
            UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?.send_to(payload, to)
        }
        sent => sent,
    }
}

const SENTINEL: &[u8] = b"lab-capture-sentinel-";

impl Drop for Capture {
    fn drop(&mut self) {
        self.tcpdump.signal(Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_dropped_is_read_from_whole_lines() {
        let said = "tcpdump: listening on br0\n\
                    tcpdump: 5 packets captured, 5 packets received by filter, 0 packets dropped by kernel\n\
                    tcpdump: 9 packets captured, 12 packets received by filter, 3 packets dropped by kernel\n\
                    tcpdump: 9 packets captured, 12 packets received by filter, 4 packets dropped by kernel";
        assert_eq!(drop_reports(said), [0, 3]);
    }
}
