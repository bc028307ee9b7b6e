use super::*;

fn file(packets: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 262_144, LINK_ETHERNET] {
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

fn tcp(sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 12];
    packet.extend_from_slice(&ETHERTYPE_V4.to_be_bytes());
    let total = u16::try_from(40 + payload.len()).unwrap().to_be_bytes();
    packet.extend_from_slice(&[
        0x45,
        0,
        total[0],
        total[1],
        0,
        0,
        0,
        0,
        64,
        PROTOCOL_TCP,
        0,
        0,
    ]);
    packet.extend_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend_from_slice(&[0x10, 0, 0, 80]);
    packet.extend_from_slice(&sequence.to_be_bytes());
    packet.extend_from_slice(&[0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
    packet.extend_from_slice(payload);
    packet
}

#[test]
fn a_marker_across_two_segments_is_found_once() {
    let file = file(&[tcp(99, 2, b""), tcp(100, 16, b"se"), tcp(102, 16, b"cret")]);
    assert_eq!(occurrences(&file, b"secret"), 1);
}

#[test]
fn segments_out_of_order_and_sent_again_count_once() {
    let file = file(&[
        tcp(99, 2, b""),
        tcp(103, 16, b"def"),
        tcp(100, 16, b"abc"),
        tcp(100, 16, b"abcd"),
    ]);
    let streams = streams(&file);
    assert_eq!(streams.len(), 1);
    assert_eq!(streams[0].bytes, b"abcdef");
    assert_eq!(streams[0].to.port(), 80);
}

#[test]
fn ports_used_again_are_another_stream() {
    let file = file(&[
        tcp(9, 2, b""),
        tcp(10, 16, b"one"),
        tcp(5000, 2, b""),
        tcp(5001, 16, b"two"),
    ]);
    let streams = streams(&file);
    assert_eq!(
        streams.iter().map(|s| &s.bytes[..]).collect::<Vec<_>>(),
        [b"one", b"two"]
    );
}

#[test]
fn the_padding_of_a_short_frame_is_not_payload() {
    let mut padded = tcp(100, 16, b"x");
    padded.extend_from_slice(&[0; 5]);
    assert_eq!(streams(&file(&[tcp(99, 2, b""), padded]))[0].bytes, b"x");
}

#[test]
fn a_packet_that_is_still_being_written_is_left_out() {
    let file = file(&[tcp(1, 16, b"whole"), tcp(6, 16, b"half")]);
    assert_eq!(packets(&file[..file.len() - 1]).unwrap().1.len(), 1);
    assert!(packets(&file[..20]).is_none());
}

#[test]
fn only_whole_records_count_as_tls() {
    let record = [23, 3, 3, 0, 2, 1, 2];
    let hello = [22, 3, 1, 0, 1, 9];
    assert_eq!(tls(&[&hello[..], &record[..]].concat()), (13, 7));
    assert_eq!(tls(&[&record[..], b"GET /"].concat()), (7, 7));
    assert_eq!(tls(b"GET / HTTP/1.1"), (0, 0));
}
