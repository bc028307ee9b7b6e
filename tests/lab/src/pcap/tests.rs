use etherparse::PacketBuilder;

use super::*;

const CLIENT: [u8; 4] = [10, 0, 0, 1];
const SERVER: [u8; 4] = [10, 0, 0, 2];

fn file(link: DataLink, packets: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 262_144, link.into()] {
        file.extend_from_slice(&word.to_ne_bytes());
    }
    for packet in packets {
        let length = u32::try_from(packet.len()).unwrap();
        for word in [0, 0, length, length] {
            file.extend_from_slice(&word.to_ne_bytes());
        }
        file.extend_from_slice(packet);
    }
    file
}

fn ethernet(packets: &[Vec<u8>]) -> Vec<u8> {
    file(DataLink::ETHERNET, packets)
}

fn tcp(sequence: u32, syn: bool, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2([0; 6], [0; 6])
        .ipv4(CLIENT, SERVER, 64)
        .tcp(4096, 80, sequence, 0);
    let builder = if syn { builder.syn() } else { builder.ack(1) };
    let mut packet = Vec::new();
    builder.write(&mut packet, payload).unwrap();
    packet
}

fn syn(sequence: u32) -> Vec<u8> {
    tcp(sequence, true, b"")
}

fn data(sequence: u32, payload: &[u8]) -> Vec<u8> {
    tcp(sequence, false, payload)
}

#[test]
fn marker_across_two_segments_is_found_once() {
    let file = ethernet(&[syn(99), data(100, b"se"), data(102, b"cret")]);
    assert_eq!(occurrences(&file, b"secret"), 1);
}

#[test]
fn reordered_and_retransmitted_segments_count_once() {
    let file = ethernet(&[
        syn(99),
        data(103, b"def"),
        data(100, b"abc"),
        data(100, b"abcd"),
    ]);
    let streams = streams(&file);
    assert_eq!(streams.len(), 1);
    assert_eq!(streams[0].bytes, b"abcdef");
    assert_eq!(streams[0].to.port(), 80);
}

#[test]
fn reused_ports_are_another_stream() {
    let file = ethernet(&[syn(9), data(10, b"one"), syn(5000), data(5001, b"two")]);
    let streams = streams(&file);
    assert_eq!(
        streams.iter().map(|s| &s.bytes[..]).collect::<Vec<_>>(),
        [b"one", b"two"]
    );
}

#[test]
fn padding_of_a_short_frame_is_not_payload() {
    let mut padded = data(100, b"x");
    padded.extend_from_slice(&[0; 5]);
    assert_eq!(streams(&ethernet(&[syn(99), padded]))[0].bytes, b"x");
}

#[test]
fn ip_length_of_zero_means_the_rest_of_the_packet() {
    let mut unsplit = data(100, b"abc");
    unsplit[16..18].fill(0);
    assert_eq!(streams(&ethernet(&[unsplit]))[0].bytes, b"abc");
}

#[test]
fn cooked_captures_of_both_families_are_read() {
    let v6 = |protocol: [u8; 2], header: &dyn Fn([u8; 2]) -> Vec<u8>| {
        let mut ip = Vec::new();
        PacketBuilder::ipv6([1; 16], [2; 16], 64)
            .tcp(4096, 80, 100, 0)
            .write(&mut ip, b"v6")
            .unwrap();
        [header(protocol), ip].concat()
    };
    let v4 = |header: &dyn Fn([u8; 2]) -> Vec<u8>| {
        [header([0x08, 0x00]), data(100, b"v4")[14..].to_vec()].concat()
    };
    let sll = |protocol: [u8; 2]| [&[0; 14][..], &protocol].concat();
    let sll2 = |protocol: [u8; 2]| [&protocol[..], &[0; 18]].concat();
    for (link, header) in [
        (DataLink::LINUX_SLL, &sll as &dyn Fn([u8; 2]) -> Vec<u8>),
        (DataLink::LINUX_SLL2, &sll2),
    ] {
        let streams = streams(&file(link, &[v4(header), v6([0x86, 0xdd], header)]));
        let bytes: Vec<_> = streams.iter().map(|stream| &stream.bytes[..]).collect();
        assert_eq!(bytes, [b"v4", b"v6"], "{link:?}");
    }
}

#[test]
fn incomplete_last_packet_is_left_out() {
    let file = ethernet(&[data(1, b"whole"), data(6, b"half")]);
    assert_eq!(packets(&file[..file.len() - 1]).unwrap().packets.len(), 1);
    assert!(packets(&file[..20]).is_none());
}

#[test]
fn only_well_formed_records_count_as_tls() {
    let record = [23, 3, 3, 0, 2, 1, 2];
    let hello = [22, 3, 1, 0, 1, 9];
    assert_eq!(tls(&[&hello[..], &record[..]].concat()), (13, 7));
    assert_eq!(tls(&[&record[..], b"GET /"].concat()), (7, 7));
    assert_eq!(tls(b"GET / HTTP/1.1"), (0, 0));
}
