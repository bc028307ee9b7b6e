//! Netlink requests to the kernel and multicast subscriptions, in the network namespace of the
//! calling thread.
//!
//! A netlink socket belongs to the namespace in which it was opened. Requests block the calling
//! thread: the kernel answers in microseconds, and [`REPLY_TIMEOUT`] bounds the case in which it
//! does not.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket,
};
use nix::sys::time::TimeVal;

/// How long the kernel may take to reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(2);

/// Largest datagram of a dump: the kernel sends none above 32 KiB (`NLMSG_GOODSIZE` and the dump's
/// own limit).
const MAX_DATAGRAM_BYTES: usize = 32 * 1024;

/// `NLMSG_ERROR` and `NLMSG_DONE` (RFC 3549 section 2.3.2).
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// Length of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;

/// A socket of one netlink family, in the namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Netlink(OwnedFd);

impl Netlink {
    /// Opens a socket for requests.
    pub(crate) fn open(protocol: SockProtocol) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        let seconds = i64::try_from(REPLY_TIMEOUT.as_secs()).unwrap_or(i64::MAX);
        setsockopt(&fd, ReceiveTimeout, &TimeVal::new(seconds, 0))?;
        Ok(Self(fd))
    }

    /// Opens a non-blocking socket that receives the notifications of multicast `groups` (numbers,
    /// from 1).
    pub(crate) fn subscribe(protocol: SockProtocol, groups: &[u32]) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        let mask = groups.iter().fold(0, |mask, group| mask | 1 << (group - 1));
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, mask))?;
        Ok(fd)
    }

    /// Sends a request of `kind` and calls `on_reply` with the type and payload of every reply, up
    /// to the end of the dump or the acknowledgement.
    pub(crate) fn request(
        &self,
        kind: u16,
        flags: u16,
        payload: &[u8],
        mut on_reply: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        let length =
            u32::try_from(HEADER_BYTES + payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(payload);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut buffer = vec![0; MAX_DATAGRAM_BYTES];
        loop {
            let read = match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(read) => read,
                // A signal was delivered to this thread.
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let mut rest = buffer.get(..read).unwrap_or_default();
            while let Some((kind, payload, next)) = split_message(rest) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return acknowledgement(payload),
                    kind => on_reply(kind, payload),
                }
                rest = next;
            }
        }
    }

    /// Sends an `rtnetlink` request and calls `on_reply` with every reply to a dump.
    pub(crate) fn route_request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut on_reply: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let mut request =
            NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        let kind = request.header.message_type;
        self.request(
            kind,
            flags,
            bytes.get(HEADER_BYTES..).unwrap_or_default(),
            |kind, payload| {
                if let Some(message) = parse_route(kind, payload) {
                    on_reply(message);
                }
            },
        )
    }
}

/// Flag of a request for which the kernel sends an acknowledgement.
pub(crate) const ACK: u16 = NLM_F_ACK;
/// Flags of a request for all objects of a kind.
pub(crate) const DUMP: u16 = NLM_F_DUMP;

/// The first message of a datagram: type, payload, and the rest of the datagram.
fn split_message(datagram: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?)).ok()?;
    let kind = u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?);
    let payload = datagram.get(HEADER_BYTES..length)?;
    let next = datagram
        .get(length.next_multiple_of(4)..)
        .unwrap_or_default();
    Some((kind, payload, next))
}

/// Outcome in an `NLMSG_ERROR` message. `struct nlmsgerr` begins with the negative error number;
/// zero is an acknowledgement.
fn acknowledgement(payload: &[u8]) -> io::Result<()> {
    let code = payload
        .get(..4)
        .and_then(|code| code.try_into().ok())
        .map_or(-(Errno::EIO as i32), i32::from_ne_bytes);
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(code.saturating_neg()))
    }
}

fn parse_route(kind: u16, payload: &[u8]) -> Option<RouteNetlinkMessage> {
    use netlink_packet_core::NetlinkDeserializable;
    let length = u32::try_from(HEADER_BYTES + payload.len()).ok()?;
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    header.length = length;
    RouteNetlinkMessage::deserialize(&header, payload).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagram_is_split_into_messages_up_to_a_truncated_one() {
        let mut datagram = Vec::new();
        for (length, kind) in [(18u32, 7u16), (16, NLMSG_DONE)] {
            datagram.extend_from_slice(&length.to_ne_bytes());
            datagram.extend_from_slice(&kind.to_ne_bytes());
            datagram.extend_from_slice(&[0; 10]);
            datagram.extend_from_slice(if length == 18 { &[1, 2, 0, 0] } else { &[] });
        }
        let (kind, payload, rest) = split_message(&datagram).expect("a first message");
        assert_eq!((kind, payload), (7, &[1u8, 2][..]));
        let (kind, payload, rest) = split_message(rest).expect("a second message");
        assert_eq!((kind, payload), (NLMSG_DONE, &[][..]));
        assert!(split_message(rest).is_none());
        assert!(
            split_message(&datagram[..17]).is_none(),
            "shorter than its length field"
        );
        assert!(
            split_message(&[0; 16]).is_none(),
            "a length of zero would loop forever"
        );
    }

    #[test]
    fn error_message_becomes_the_errno_that_it_carries() {
        assert!(acknowledgement(&0i32.to_ne_bytes()).is_ok());
        let refused = acknowledgement(&(-17i32).to_ne_bytes()).expect_err("EEXIST");
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert!(acknowledgement(&[]).is_err());
    }
}
