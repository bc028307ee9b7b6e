//! Records the packets of a location with tcpdump.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, UdpSocket};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::net::if_::if_nametoindex;
use nix::sys::signal::Signal;

use crate::location::Location;
use crate::model::topology::{FABRIC_BROADCAST_V4, GATEWAY_V4, GATEWAY_V6};
use crate::netns;
use crate::pcap;
use crate::poll;
use crate::process::{Process, contains};
use crate::tools;

/// tcpdump starts and writes a packet within milliseconds.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Port of the sentinel packets (discard, RFC 863): once a sentinel is in the file, so are all
/// packets before it.
const SENTINEL_PORT: u16 = 9;

/// Start of every sentinel's payload.
const SENTINEL: &[u8] = b"lab-capture-sentinel-";

/// A running capture, stopped when dropped. Each query covers all packets up to its call.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Process,
    netns: String,
    location: Location,
    file: PathBuf,
    _dir: tempfile::TempDir,
}

/// How many bytes of a capture are TLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TlsBytes {
    /// Bytes inside well-formed TLS records, headers included.
    pub records: usize,
    /// Of those, bytes of encrypted application data: in TLS 1.3, everything after the hellos.
    pub application_data: usize,
}

impl Capture {
    pub(crate) fn start(netns: String, location: Location, filter: &str) -> Result<Self> {
        tools::require("tcpdump", "tcpdump")?;
        let dir = tempfile::tempdir().context("cannot create a folder for a capture")?;
        let file = dir.path().join("pcap");
        // A bridge device receives forwarded frames only while it is promiscuous.
        let interface: &[&str] = match location {
            Location::Fabric => &["-i", "br0"],
            Location::Node(_) => &["-p", "-i", "any"],
            Location::Pod(_) => &["-p", "-i", "eth0"],
        };
        let mut tcpdump = Command::new("ip");
        tcpdump
            .args(["netns", "exec", &netns, "tcpdump", "-n"])
            .args(interface);
        // Each packet is written at once and in full. A ring of 64 MiB absorbs bursts on a busy
        // machine. tcpdump stays root: its own user cannot write to the folder.
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
            .wait_stderr("listening on", TIMEOUT)
            .with_context(|| format!("tcpdump in {location}"))?;
        Ok(Self {
            tcpdump,
            netns,
            location,
            file,
            _dir: dir,
        })
    }

    /// How often `marker` occurs: in the raw bytes of packets, or in the reassembled TCP streams,
    /// whichever is more.
    ///
    /// # Errors
    /// The capture is incomplete: tcpdump has exited, or the kernel dropped packets.
    pub fn occurrences(&self, marker: impl AsRef<[u8]>) -> Result<usize> {
        Ok(pcap::occurrences(&self.pcap()?, marker.as_ref()))
    }

    /// How many packets were captured.
    ///
    /// # Errors
    /// The capture is incomplete.
    pub fn packet_count(&self) -> Result<usize> {
        let file = self.pcap()?;
        let packets = pcap::packets(&file)
            .map(|file| file.packets)
            .unwrap_or_default();
        Ok(packets
            .iter()
            .filter(|packet| !contains(packet, SENTINEL))
            .count())
    }

    /// TCP payload bytes to and from this port, each byte counted once.
    ///
    /// # Errors
    /// The capture is incomplete.
    pub fn tcp_bytes(&self, port: u16) -> Result<usize> {
        let streams = self.streams(port)?;
        Ok(streams.iter().map(|stream| stream.bytes.len()).sum())
    }

    /// How many of the TCP payload bytes to and from this port are TLS.
    ///
    /// # Errors
    /// The capture is incomplete.
    pub fn tls_bytes(&self, port: u16) -> Result<TlsBytes> {
        let mut sum = TlsBytes::default();
        for stream in self.streams(port)? {
            let (records, application_data) = pcap::tls(&stream.bytes);
            sum.records += records;
            sum.application_data += application_data;
        }
        Ok(sum)
    }

    fn streams(&self, port: u16) -> Result<Vec<pcap::Stream>> {
        let mut streams = pcap::streams(&self.pcap()?);
        streams.retain(|stream| stream.from.port() == port || stream.to.port() == port);
        Ok(streams)
    }

    /// The pcap file, with all packets up to now.
    ///
    /// # Errors
    /// tcpdump has exited, or the kernel dropped packets.
    pub fn pcap(&self) -> Result<Vec<u8>> {
        let sentinel = self.send_sentinel()?;
        let complete = poll::until(TIMEOUT, poll::FAST_INTERVAL, || {
            let file = std::fs::read(&self.file).unwrap_or_default();
            contains(&file, &sentinel).then_some(file)
        });
        let file = complete.with_context(|| {
            format!(
                "tcpdump in {} does not write packets: {}",
                self.location,
                self.stderr()
            )
        })?;
        match self.dropped_packets()? {
            0 => Ok(file),
            lost => bail!(
                "the capture in {} lacks {lost} packets that the kernel dropped",
                self.location
            ),
        }
    }

    /// How many packets the kernel dropped since the start because tcpdump was too slow. tcpdump
    /// reports it on SIGUSR1.
    fn dropped_packets(&self) -> Result<u64> {
        let reports = || drop_reports(&self.stderr());
        let before = reports().len();
        self.tcpdump.signal(Signal::SIGUSR1);
        let fresh = poll::until(TIMEOUT, poll::FAST_INTERVAL, || {
            let reports = reports();
            (reports.len() > before)
                .then(|| reports.last().copied())
                .flatten()
        });
        fresh.with_context(|| {
            format!(
                "tcpdump in {} does not report dropped packets: {}",
                self.location,
                self.stderr()
            )
        })
    }

    /// Sends a packet with a unique payload: once it is in the file, so are all packets before it.
    fn send_sentinel(&self) -> Result<Vec<u8>> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut payload = SENTINEL.to_vec();
        payload.extend_from_slice(format!("{}-{number};", std::process::id()).as_bytes());
        let location = self.location.clone();
        let sent = netns::run_in(&self.netns, || send(&location, &payload))?;
        sent.with_context(|| format!("cannot send a sentinel packet in {}", self.location))?;
        Ok(payload)
    }

    fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.tcpdump.stderr()).into_owned()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.tcpdump.signal(Signal::SIGKILL);
    }
}

/// The numbers in tcpdump's lines `N packets dropped by kernel`; an incomplete line is skipped.
fn drop_reports(stderr: &str) -> Vec<u64> {
    let lines = stderr
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

/// Sends to an address whose packets cross the captured interface. Nothing needs to listen there.
fn send(location: &Location, payload: &[u8]) -> io::Result<usize> {
    let to = match location {
        Location::Fabric => FABRIC_BROADCAST_V4,
        Location::Node(_) => Ipv4Addr::LOCALHOST,
        Location::Pod(_) => GATEWAY_V4,
    };
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_broadcast(true)?;
    match socket.send_to(payload, (to, SENTINEL_PORT)) {
        // A pod without IPv4.
        Err(_) if matches!(location, Location::Pod(_)) => {
            let to = SocketAddrV6::new(GATEWAY_V6, SENTINEL_PORT, 0, if_nametoindex("eth0")?);
            UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?.send_to(payload, to)
        }
        sent => sent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drop_count_is_read_from_complete_lines() {
        let stderr = "tcpdump: listening on br0\n\
                    tcpdump: 5 packets captured, 5 packets received by filter, 0 packets dropped by kernel\n\
                    tcpdump: 9 packets captured, 12 packets received by filter, 3 packets dropped by kernel\n\
                    tcpdump: 9 packets captured, 12 packets received by filter, 4 packets dropped by kernel";
        assert_eq!(drop_reports(stderr), [0, 3]);
    }
}
