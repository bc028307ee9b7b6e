//! Questions to the kernel over netlink, asked inside a pod's network namespace and answered at
//! once.
//!
//! A netlink socket belongs to the namespace in which it was made. These are blocking calls on a
//! thread made for them: the kernel answers in microseconds, and [`ANSWER`] bounds the case in
//! which it does not.

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

/// How long the kernel may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// The largest datagram of a dump: the kernel never makes one above 32 KiB (`NLMSG_GOODSIZE` and
/// the dump's own limit).
const DATAGRAM: usize = 32 * 1024;

/// `NLMSG_ERROR` and `NLMSG_DONE` (RFC 3549 section 2.3.2).
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// A socket to one netlink family, in the namespace of the thread that made it.
#[derive(Debug)]
pub(crate) struct Netlink(OwnedFd);

impl Netlink {
    /// Opens a socket for questions.
    pub(crate) fn open(protocol: SockProtocol) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        let seconds = i64::try_from(ANSWER.as_secs()).unwrap_or(i64::MAX);
        setsockopt(&fd, ReceiveTimeout, &TimeVal::new(seconds, 0))?;
        Ok(Self(fd))
    }

    /// Opens a socket that hears of changes: of each group in `groups` (numbers, from 1).
    pub(crate) fn listen(protocol: SockProtocol, groups: &[u32]) -> io::Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        let mask = groups.iter().fold(0, |mask, group| mask | 1 << (group - 1));
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, mask))?;
        Ok(fd)
    }

    /// Sends one message of `kind` and hands the type and the payload of every answer to `each`, up
    /// to the end of the dump or the acknowledgement.
    pub(crate) fn call(
        &self,
        kind: u16,
        flags: u16,
        payload: &[u8],
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<()> {
        let length =
            u32::try_from(HEADER + payload.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut message = Vec::with_capacity(HEADER + payload.len());
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        message.extend_from_slice(&[0; 8]);
        message.extend_from_slice(payload);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut buffer = vec![0; DATAGRAM];
        loop {
            let read = match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(read) => read,
                // A signal for another part of the process.
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let mut rest = buffer.get(..read).unwrap_or_default();
            while let Some((kind, payload, next)) = split(rest) {
                match kind {
                    DONE => return Ok(()),
                    ERROR => return error(payload),
                    kind => each(kind, payload),
                }
                rest = next;
            }
        }
    }

    /// Asks or tells `rtnetlink` something; answers to a dump go to `each`.
    pub(crate) fn route(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        let mut request =
            NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        let kind = request.header.message_type;
        self.call(
            kind,
            flags,
            bytes.get(HEADER..).unwrap_or_default(),
            |kind, payload| {
                if let Some(message) = parse_route(kind, payload) {
                    each(message);
                }
            },
        )
    }
}

/// Flags of a request that changes something and is acknowledged.
pub(crate) const CHANGE: u16 = NLM_F_ACK;
/// Flags of a request for everything of a kind.
pub(crate) const DUMP: u16 = NLM_F_DUMP;

/// The first message of a datagram: its type, its payload, and what follows it.
fn split(datagram: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(datagram.get(..4)?.try_into().ok()?)).ok()?;
    let kind = u16::from_ne_bytes(datagram.get(4..6)?.try_into().ok()?);
    let payload = datagram.get(HEADER..length)?;
    let next = datagram
        .get(length.next_multiple_of(4)..)
        .unwrap_or_default();
    Some((kind, payload, next))
}

/// `struct nlmsgerr` begins with the negative error number; zero is the acknowledgement.
fn error(payload: &[u8]) -> io::Result<()> {
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
    let length = u32::try_from(HEADER + payload.len()).ok()?;
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    header.length = length;
    RouteNetlinkMessage::deserialize(&header, payload).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_is_split_into_its_messages_and_a_torn_one_ends_it() {
        let mut datagram = Vec::new();
        for (length, kind) in [(18u32, 7u16), (16, DONE)] {
            datagram.extend_from_slice(&length.to_ne_bytes());
            datagram.extend_from_slice(&kind.to_ne_bytes());
            datagram.extend_from_slice(&[0; 10]);
            datagram.extend_from_slice(if length == 18 { &[1, 2, 0, 0] } else { &[] });
        }
        let (kind, payload, rest) = split(&datagram).expect("a first message");
        assert_eq!((kind, payload), (7, &[1u8, 2][..]));
        let (kind, payload, rest) = split(rest).expect("a second message");
        assert_eq!((kind, payload), (DONE, &[][..]));
        assert!(split(rest).is_none());
        assert!(
            split(&datagram[..17]).is_none(),
            "shorter than its own length field says"
        );
        assert!(
            split(&[0; 16]).is_none(),
            "a length of zero would never end"
        );
    }

    #[test]
    fn an_error_message_becomes_the_errno_it_carries() {
        assert!(error(&0i32.to_ne_bytes()).is_ok());
        let refused = error(&(-17i32).to_ne_bytes()).expect_err("EEXIST");
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert!(error(&[]).is_err());
    }
}
