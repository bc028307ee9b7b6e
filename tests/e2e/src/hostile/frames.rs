//! Encodes HTTP/2 frames (RFC 9113 section 4), valid or not, and decodes a response's `:status`.

/// Frame types, RFC 9113 section 6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameType {
    /// DATA
    Data = 0,
    /// HEADERS
    Headers = 1,
    /// RST_STREAM
    RstStream = 3,
    /// SETTINGS
    Settings = 4,
    /// PING
    Ping = 6,
    /// GOAWAY
    GoAway = 7,
    /// WINDOW_UPDATE
    WindowUpdate = 8,
    /// CONTINUATION
    Continuation = 9,
}

/// A received frame.
#[derive(Debug, Clone)]
pub struct Frame {
    /// The type, see [`FrameType`].
    pub frame_type: u8,
    /// The flags.
    pub flags: u8,
    /// The stream id; 0 is the connection.
    pub stream: u32,
    /// The payload.
    pub payload: Vec<u8>,
}

/// END_STREAM, and ACK on SETTINGS and PING.
pub(super) const END_STREAM: u8 = 0x1;
/// END_HEADERS
pub(super) const END_HEADERS: u8 = 0x4;

/// Encodes one frame. A payload is cut after 16,777,215 bytes, the most that fits a frame.
pub fn frame(frame_type: FrameType, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(0xff_ffff)];
    let mut bytes = Vec::with_capacity(9 + payload.len());
    // The length has three bytes on the wire.
    bytes.extend_from_slice(
        &u32::try_from(payload.len())
            .unwrap_or_default()
            .to_be_bytes()[1..],
    );
    bytes.extend_from_slice(&[frame_type as u8, flags]);
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Encodes a HEADERS frame with END_HEADERS. Each field is a literal that is never indexed.
pub fn headers(stream: u32, fields: &[(&str, &str)], end_stream: bool) -> Vec<u8> {
    let block: Vec<u8> = fields
        .iter()
        .flat_map(|(name, value)| literal(name, value))
        .collect();
    let flags = END_HEADERS | if end_stream { END_STREAM } else { 0 };
    frame(FrameType::Headers, flags, stream, &block)
}

/// Encodes the HEADERS of a CONNECT.
pub fn connect(stream: u32, authority: &str) -> Vec<u8> {
    headers(
        stream,
        &[(":method", "CONNECT"), (":authority", authority)],
        false,
    )
}

/// Encodes a SETTINGS frame with these (id, value) pairs.
pub fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let entry = |(id, value): &(u16, u32)| {
        let mut bytes = id.to_be_bytes().to_vec();
        bytes.extend_from_slice(&value.to_be_bytes());
        bytes
    };
    frame(
        FrameType::Settings,
        0,
        0,
        &values.iter().flat_map(entry).collect::<Vec<_>>(),
    )
}

/// Encodes RST_STREAM with CANCEL.
pub fn rst_stream(stream: u32) -> Vec<u8> {
    frame(FrameType::RstStream, 0, stream, &8_u32.to_be_bytes())
}

/// Encodes a header field as in RFC 7541 section 6.2.3: never indexed, new name, no Huffman code.
pub fn literal(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0x10];
    for text in [name, value] {
        push_length(&mut bytes, text.len());
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

/// Encodes an integer as in RFC 7541 section 5.1 with a prefix of 7 bits.
fn push_length(bytes: &mut Vec<u8>, length: usize) {
    if length < 0x7f {
        bytes.push(length.to_le_bytes()[0]);
        return;
    }
    bytes.push(0x7f);
    let mut rest = length - 0x7f;
    while rest >= 0x80 {
        bytes.push(rest.to_le_bytes()[0] | 0x80);
        rest >>= 7;
    }
    bytes.push(rest.to_le_bytes()[0]);
}

/// Decodes the `:status` of a response. The tests allow the peer no dynamic header table, so `:status` is the first
/// field, and either an entry of the static table or a literal with a static name (RFC 7541 appendix A, entries 8 to 14).
pub(super) fn status(block: &[u8]) -> Option<u16> {
    // A dynamic table size update may come first.
    let start = block.iter().position(|byte| byte & 0xe0 != 0x20)?;
    let (first, rest) = block.get(start..)?.split_first()?;
    if let Some(status) =
        [200, 204, 206, 304, 400, 404, 500].get(usize::from(first.wrapping_sub(0x88)))
    {
        return Some(*status);
    }
    if !(0x48..=0x4e).contains(first)
        && !(0x08..=0x0e).contains(first)
        && !(0x18..=0x1e).contains(first)
    {
        return None;
    }
    let (size, rest) = rest.split_first()?;
    let value = rest.get(..usize::from(size & 0x7f))?;
    let digits = if size & 0x80 == 0 {
        value.to_vec()
    } else {
        huffman_digits(value)?
    };
    std::str::from_utf8(&digits).ok()?.parse().ok()
}

/// Decodes Huffman-coded digits, RFC 7541 appendix B: 0 to 2 have five bits, the others six. The padding is all ones.
fn huffman_digits(bytes: &[u8]) -> Option<Vec<u8>> {
    let bit = |at: usize| bytes.get(at / 8).map(|byte| byte >> (7 - at % 8) & 1);
    let bits = |at: usize, count: usize| {
        (at..at + count).try_fold(0, |value: u8, at| Some(value << 1 | bit(at)?))
    };
    let (mut at, mut digits) = (0, Vec::new());
    while let Some(five) = bits(at, 5) {
        match (five, bits(at, 6)) {
            (0..=2, _) => (digits.push(b'0' + five), at += 5).1,
            (_, Some(six @ 0x19..=0x1f)) => (digits.push(b'3' + six - 0x19), at += 6).1,
            (0x1f, _) => break,
            _ => return None,
        }
    }
    Some(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_decoded_in_every_encoding() {
        assert_eq!(status(&[0x88]), Some(200));
        assert_eq!(status(&[0x20, 0x8c]), Some(400));
        assert_eq!(status(b"\x48\x03503"), Some(503));
        // The example of RFC 7541 section C.6.1: 302.
        assert_eq!(status(&[0x48, 0x82, 0x64, 0x02]), Some(302));
        assert_eq!(status(&[0x08, 0x82, 0x68, 0x01]), Some(401));
        assert_eq!(status(&[]), None);
        assert_eq!(status(&[0x40]), None);
    }

    #[test]
    fn long_literal_has_a_multi_byte_length() {
        // RFC 7541 section C.1.2 has 1337 with a prefix of 5 bits; with 7 bits it is 127 + 1210.
        let field = literal("", &"x".repeat(1337));
        assert_eq!(field[..5], [0x10, 0, 0x7f, 0xba, 0x09]);
    }

    #[test]
    fn frame_header_has_length_type_flags_and_stream() {
        assert_eq!(
            frame(FrameType::Data, 1, 3, b"ab"),
            [0, 0, 2, 0, 1, 0, 0, 0, 3, b'a', b'b']
        );
    }
}
