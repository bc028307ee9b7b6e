//! Reading what tcpdump wrote: packets, TCP streams, TLS records.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::process::contains;

const PROTOCOL_TCP: u8 = 6;
const ETHERTYPE_V4: u16 = 0x0800;
const ETHERTYPE_V6: u16 = 0x86dd;

/// Link-layer header types of the pcap format, and the length of their headers.
const LINK_ETHERNET: u32 = 1;
const LINK_LINUX_SLL: u32 = 113;
const LINK_LINUX_SLL2: u32 = 276;

/// The packets of a pcap file, each as its raw bytes. The last one may still be being written: it
/// is left out. `None` if this is not such a file.
pub(crate) fn packets(file: &[u8]) -> Option<(u32, Vec<&[u8]>)> {
    let (header, mut rest) = file.split_at_checked(24)?;
    // tcpdump writes in the byte order of its machine, which is ours.
    (u32_at(header, 0)? == 0xa1b2_c3d4).then_some(())?;
    let link = u32_at(header, 20)? & 0xffff;
    let mut packets = Vec::new();
    while let Some((record, after)) = rest.split_at_checked(16) {
        let length = usize::try_from(u32_at(record, 8)?).ok()?;
        let Some((packet, after)) = after.split_at_checked(length) else {
            break;
        };
        packets.push(packet);
        rest = after;
    }
    Some((link, packets))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// One TCP segment.
struct Segment<'a> {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

fn segment(link: u32, packet: &[u8]) -> Option<Segment<'_>> {
    let (ethertype, ip) = match link {
        LINK_ETHERNET => (be16(packet, 12)?, packet.get(14..)?),
        LINK_LINUX_SLL => (be16(packet, 14)?, packet.get(16..)?),
        LINK_LINUX_SLL2 => (be16(packet, 0)?, packet.get(20..)?),
        _ => return None,
    };
    let (protocol, from, to, tcp) = match ethertype {
        ETHERTYPE_V4 => ipv4(ip)?,
        ETHERTYPE_V6 => ipv6(ip)?,
        _ => return None,
    };
    (protocol == PROTOCOL_TCP).then_some(())?;
    let header = usize::from(*tcp.get(12)? >> 4) * 4;
    Some(Segment {
        from: SocketAddr::new(from, be16(tcp, 0)?),
        to: SocketAddr::new(to, be16(tcp, 2)?),
        sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
        syn: tcp.get(13)? & 0x02 != 0,
        payload: tcp.get(header..)?,
    })
}

fn ipv4(ip: &[u8]) -> Option<(u8, IpAddr, IpAddr, &[u8])> {
    let header = usize::from(*ip.first()? & 0x0f) * 4;
    let address = |at: usize| {
        let octets: [u8; 4] = ip.get(at..at + 4)?.try_into().ok()?;
        Some(IpAddr::V4(Ipv4Addr::from(octets)))
    };
    // Ethernet pads short frames: the IP header knows where the packet ends. A length of zero is a
    // segment that the kernel has not cut yet.
    let total = match usize::from(be16(ip, 2)?) {
        0 => ip.len(),
        length => length,
    };
    Some((
        *ip.get(9)?,
        address(12)?,
        address(16)?,
        ip.get(header..total.min(ip.len()))?,
    ))
}

fn ipv6(ip: &[u8]) -> Option<(u8, IpAddr, IpAddr, &[u8])> {
    let address = |at: usize| {
        let octets: [u8; 16] = ip.get(at..at + 16)?.try_into().ok()?;
        Some(IpAddr::V6(Ipv6Addr::from(octets)))
    };
    let end = match usize::from(be16(ip, 4)?) {
        0 => ip.len(),
        length => (40 + length).min(ip.len()),
    };
    Some((*ip.get(6)?, address(8)?, address(24)?, ip.get(40..end)?))
}

/// One direction of one TCP connection, its bytes in order.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

/// The TCP streams of a capture. Retransmissions count once; a gap (a packet that was not
/// captured) is closed up, so that what comes after it is still searched.
pub(crate) fn streams(file: &[u8]) -> Vec<Stream> {
    let Some((link, packets)) = packets(file) else {
        return Vec::new();
    };
    let mut flows: BTreeMap<(SocketAddr, SocketAddr), Vec<Flow>> = BTreeMap::new();
    for segment in packets.iter().filter_map(|packet| segment(link, packet)) {
        let flows = flows.entry((segment.from, segment.to)).or_default();
        // A SYN with another initial sequence number is a new connection on the same ports.
        let new = flows
            .last()
            .is_none_or(|flow| segment.syn && flow.start != segment.sequence);
        if new {
            flows.push(Flow {
                start: segment.sequence,
                segments: BTreeMap::new(),
            });
        }
        if let Some(flow) = flows.last_mut() {
            flow.add(&segment);
        }
    }
    let assembled = |((from, to), flows): ((SocketAddr, SocketAddr), Vec<Flow>)| {
        flows.into_iter().map(move |flow| Stream {
            from,
            to,
            bytes: flow.assemble(),
        })
    };
    flows
        .into_iter()
        .flat_map(assembled)
        .filter(|stream| !stream.bytes.is_empty())
        .collect()
}

struct Flow {
    start: u32,
    /// By offset from the first sequence number seen.
    segments: BTreeMap<u32, Vec<u8>>,
}

impl Flow {
    fn add(&mut self, segment: &Segment<'_>) {
        if segment.payload.is_empty() {
            return;
        }
        let offset = segment
            .sequence
            .wrapping_add(u32::from(segment.syn))
            .wrapping_sub(self.start);
        let kept = self.segments.entry(offset).or_default();
        if kept.len() < segment.payload.len() {
            *kept = segment.payload.to_owned();
        }
    }

    fn assemble(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut end: u64 = 0;
        for (offset, payload) in self.segments {
            let offset = u64::from(offset);
            let known = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
            bytes.extend_from_slice(payload.get(known..).unwrap_or_default());
            end = end.max(offset + payload.len() as u64);
        }
        bytes
    }
}

/// How often the marker occurs in the capture: in a packet's raw bytes, or across the segments of
/// a TCP stream.
pub(crate) fn occurrences(file: &[u8], marker: &[u8]) -> usize {
    let Some((_, packets)) = packets(file) else {
        return 0;
    };
    let raw: usize = packets.iter().map(|packet| count(packet, marker)).sum();
    let assembled: usize = streams(file)
        .iter()
        .map(|stream| count(&stream.bytes, marker))
        .sum();
    raw.max(assembled)
}

fn count(bytes: &[u8], marker: &[u8]) -> usize {
    if marker.is_empty() || !contains(bytes, marker) {
        return 0;
    }
    bytes
        .windows(marker.len())
        .filter(|window| *window == marker)
        .count()
}

/// How many bytes of a stream are inside well-formed TLS records, and how many of those are
/// encrypted application data; the first byte that does not start a record ends the count.
pub(crate) fn tls(bytes: &[u8]) -> (usize, usize) {
    let (mut rest, mut records, mut application) = (bytes, 0, 0);
    while let [kind @ 20..=23, 3, 1..=4, high, low, ..] = *rest {
        let length = 5 + usize::from(u16::from_be_bytes([high, low]));
        // The last record may still be under way.
        let here = length.min(rest.len());
        records += here;
        if kind == 23 {
            application += here;
        }
        rest = &rest[here..];
    }
    (records, application)
}

#[cfg(test)]
mod tests;
