//! Reads pcap files written by tcpdump: packets, TCP streams, TLS records.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use etherparse::{EtherType, LaxNetSlice, LaxSlicedPacket, TransportSlice};
use pcap_file::DataLink;
use pcap_file::pcap::PcapParser;

use crate::process::contains;

/// The packets of a pcap file.
#[derive(Debug)]
pub(crate) struct Packets<'a> {
    link: DataLink,
    /// Each packet with its link-layer header.
    pub(crate) packets: Vec<Cow<'a, [u8]>>,
}

/// Reads a pcap file. tcpdump may still be writing the last packet: an incomplete one is left out.
/// `None` if the file has no pcap header.
pub(crate) fn packets(file: &[u8]) -> Option<Packets<'_>> {
    let (mut rest, parser) = PcapParser::new(file).ok()?;
    let mut packets = Vec::new();
    // The raw form: the other one refuses packets longer than the snapshot length, which segments
    // before segmentation offload can be.
    while let Ok((after, packet)) = parser.next_raw_packet(rest) {
        packets.push(packet.data);
        rest = after;
    }
    Some(Packets {
        link: parser.header().datalink,
        packets,
    })
}

/// One TCP segment.
struct Segment<'a> {
    from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    syn: bool,
    payload: &'a [u8],
}

/// The TCP segment in a packet; `None` if it is another protocol.
///
/// The lax parser takes the packet's length where the IP header has a length of zero, as in a
/// segment that the kernel has not yet split (segmentation offload).
fn segment(link: DataLink, packet: &[u8]) -> Option<Segment<'_>> {
    // The length of the header of Linux "cooked" captures, and the offset of its protocol field.
    let cooked = |length: usize, protocol_at: usize| {
        let protocol = packet.get(protocol_at..protocol_at + 2)?.try_into().ok()?;
        let ether_type = EtherType(u16::from_be_bytes(protocol));
        Some(LaxSlicedPacket::from_ether_type(
            ether_type,
            packet.get(length..)?,
        ))
    };
    let parsed = match link {
        DataLink::ETHERNET => LaxSlicedPacket::from_ethernet(packet).ok()?,
        DataLink::LINUX_SLL => cooked(16, 14)?,
        DataLink::LINUX_SLL2 => cooked(20, 0)?,
        _ => return None,
    };
    let (from, to): (IpAddr, IpAddr) = match parsed.net? {
        LaxNetSlice::Ipv4(ip) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        LaxNetSlice::Ipv6(ip) => {
            let header = ip.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        LaxNetSlice::Arp(_) => return None,
    };
    let Some(TransportSlice::Tcp(tcp)) = parsed.transport else {
        return None;
    };
    Some(Segment {
        from: SocketAddr::new(from, tcp.source_port()),
        to: SocketAddr::new(to, tcp.destination_port()),
        sequence: tcp.sequence_number(),
        syn: tcp.syn(),
        payload: tcp.payload(),
    })
}

/// One direction of one TCP connection, its bytes in order.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

/// The TCP streams of a capture. Retransmitted bytes count once. A gap (a packet that was not
/// captured) is skipped, so that the bytes after it are searched too.
pub(crate) fn streams(file: &[u8]) -> Vec<Stream> {
    let Some(Packets { link, packets }) = packets(file) else {
        return Vec::new();
    };
    let mut flows: BTreeMap<(SocketAddr, SocketAddr), Vec<Flow>> = BTreeMap::new();
    for segment in packets.iter().filter_map(|packet| segment(link, packet)) {
        let flows = flows.entry((segment.from, segment.to)).or_default();
        // A SYN with another initial sequence number is a new connection on the same ports.
        let is_new = flows
            .last()
            .is_none_or(|flow| segment.syn && flow.start != segment.sequence);
        if is_new {
            flows.push(Flow {
                start: segment.sequence,
                segments: BTreeMap::new(),
            });
        }
        if let Some(flow) = flows.last_mut() {
            flow.add(&segment);
        }
    }
    let reassembled = |((from, to), flows): ((SocketAddr, SocketAddr), Vec<Flow>)| {
        flows.into_iter().map(move |flow| Stream {
            from,
            to,
            bytes: flow.reassemble(),
        })
    };
    flows
        .into_iter()
        .flat_map(reassembled)
        .filter(|stream| !stream.bytes.is_empty())
        .collect()
}

/// The segments of one direction of a connection.
struct Flow {
    /// The first sequence number seen.
    start: u32,
    /// Payloads by offset from `start`.
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
        let longest = self.segments.entry(offset).or_default();
        if longest.len() < segment.payload.len() {
            *longest = segment.payload.to_owned();
        }
    }

    fn reassemble(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut end: u64 = 0;
        for (offset, payload) in self.segments {
            let offset = u64::from(offset);
            let overlap = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
            bytes.extend_from_slice(payload.get(overlap..).unwrap_or_default());
            end = end.max(offset + payload.len() as u64);
        }
        bytes
    }
}

/// How often the marker occurs in the capture: in the raw bytes of packets, or in the reassembled
/// TCP streams, whichever is more.
pub(crate) fn occurrences(file: &[u8], marker: &[u8]) -> usize {
    let Some(Packets { packets, .. }) = packets(file) else {
        return 0;
    };
    let in_packets: usize = packets.iter().map(|packet| count(packet, marker)).sum();
    let in_streams: usize = streams(file)
        .iter()
        .map(|stream| count(&stream.bytes, marker))
        .sum();
    in_packets.max(in_streams)
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
/// encrypted application data. The first byte that does not start a record ends the count.
pub(crate) fn tls(bytes: &[u8]) -> (usize, usize) {
    const APPLICATION_DATA: u8 = 23;
    let (mut rest, mut in_records, mut in_application_data) = (bytes, 0, 0);
    while let [content_type @ 20..=23, 3, 1..=4, high, low, ..] = *rest {
        let length = 5 + usize::from(u16::from_be_bytes([high, low]));
        // The end of the last record may not have been captured yet.
        let captured = length.min(rest.len());
        in_records += captured;
        if content_type == APPLICATION_DATA {
            in_application_data += captured;
        }
        rest = &rest[captured..];
    }
    (in_records, in_application_data)
}

#[cfg(test)]
mod tests;
