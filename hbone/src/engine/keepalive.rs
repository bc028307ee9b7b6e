//! When a tunnel's peer is pinged, and when it is dead.
//!
//! Any received byte proves that the peer is alive, so a ping is sent only after silence. This also avoids a deadlock:
//! h2 reads no further frame while it has a ping, or a ping response, that it cannot write. It cannot write while the
//! kernel's send buffer is full, and the buffer stays full while the other end does not read. So two ends that ping each
//! other during bulk transfer in both directions can block until both are declared dead. Both ends must have a ping
//! frame to write for this. A peer that pings at a fixed interval, as Istio's server does every 10 s, cannot cause it
//! alone: we have a response to write only after its ping has left it, so it has no ping frame of its own to write, it
//! continues to read, and our response leaves.

use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::Instant;

/// How long a suspected peer may stay silent after a ping before its tunnel is avoided: well above a round trip and the
/// scheduling delay of a busy node.
const SUSPECT_TIMEOUT: Duration = Duration::from_secs(2);

/// When bytes last arrived from the peer. Clones share the value.
#[derive(Clone)]
pub(super) struct LastReceived(Rc<Cell<Instant>>);

impl LastReceived {
    pub(super) fn new(now: Instant) -> Self {
        Self(Rc::new(Cell::new(now)))
    }

    /// Records that bytes have arrived.
    pub(super) fn record(&self, now: Instant) {
        self.0.set(now);
    }

    pub(super) fn at(&self) -> Instant {
        self.0.get()
    }
}

/// What the driver of a tunnel has to do at a deadline.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Send a ping.
    SendPing,
    /// Fail the tunnel: the peer was silent for the timeout after a ping.
    Fail,
    /// Open no more streams: a suspected peer was silent for [`SUSPECT_TIMEOUT`]. It may still respond.
    Avoid,
    /// Nothing: the timer fired early, or bytes have arrived meanwhile.
    None,
}

/// The ping state of one tunnel. At most one ping is in flight.
pub(super) struct Keepalive {
    interval: Duration,
    timeout: Duration,
    last_received: LastReceived,
    /// When the last ping was sent, or answered.
    last_ping: Instant,
    is_waiting: bool,
    suspected_since: Option<Instant>,
}

impl Keepalive {
    /// Pings after `interval` of silence, and fails after a further `timeout` of silence.
    pub(super) fn new(interval: Duration, timeout: Duration, last_received: LastReceived) -> Self {
        Self {
            interval,
            timeout,
            last_ping: last_received.at(),
            last_received,
            is_waiting: false,
            suspected_since: None,
        }
    }

    /// Starts to suspect the peer, because it has not responded to a request. Returns whether to send a ping now.
    #[must_use]
    pub(super) fn suspect(&mut self, now: Instant) -> bool {
        self.suspected_since.get_or_insert(now);
        let was_waiting = std::mem::replace(&mut self.is_waiting, true);
        if !was_waiting {
            self.last_ping = now;
        }
        !was_waiting
    }

    /// When [`Keepalive::on_deadline`] is due, if the peer stays silent until then.
    pub(super) fn next_deadline(&self) -> Instant {
        let limit = if self.is_waiting {
            self.timeout
        } else {
            self.interval
        };
        let due = self.last_ping.max(self.last_received.at()) + limit;
        self.suspected_since
            .map_or(due, |since| due.min(since + SUSPECT_TIMEOUT))
    }

    pub(super) fn on_deadline(&mut self, now: Instant) -> Action {
        if now < self.next_deadline() {
            return Action::None;
        }
        if let Some(since) = self.suspected_since
            && now >= since + SUSPECT_TIMEOUT
        {
            self.suspected_since = None;
            return if self.last_received.at() > since {
                Action::None
            } else {
                Action::Avoid
            };
        }
        if self.is_waiting {
            return Action::Fail;
        }
        (self.is_waiting, self.last_ping) = (true, now);
        Action::SendPing
    }

    /// The peer has answered the ping.
    pub(super) fn on_pong(&mut self, now: Instant) {
        (self.is_waiting, self.last_ping) = (false, now);
    }
}

/// Sends pings on an h2 connection and waits for their answers.
pub(super) struct Pinger(Option<PingPong>);

impl Pinger {
    pub(super) fn new(ping_pong: Option<PingPong>) -> Self {
        Self(ping_pong)
    }

    pub(super) fn send_ping(&mut self) {
        if let Some(ping_pong) = &mut self.0 {
            // Fails if the connection has ended, which the connection reports itself.
            let _ended = ping_pong.send_ping(Ping::opaque());
        }
    }

    /// Resolves when a ping is answered.
    pub(super) async fn pong(&mut self) {
        match &mut self.0 {
            // An error means that the connection has ended, which the connection reports itself.
            Some(ping_pong) => {
                poll_fn(|cx| match ping_pong.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => Poll::Ready(()),
                    Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
                })
                .await;
            }
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);
    const TIMEOUT: Duration = Duration::from_secs(20);

    fn keepalive() -> (Keepalive, LastReceived, Instant) {
        let start = Instant::now();
        let received = LastReceived::new(start);
        let keepalive = Keepalive::new(INTERVAL, TIMEOUT, received.clone());
        (keepalive, received, start)
    }

    #[test]
    fn silent_peer_that_answers_is_pinged_every_interval() {
        let (mut keepalive, _, start) = keepalive();
        for n in 1..5 {
            let now = start + INTERVAL * n;
            assert_eq!(keepalive.next_deadline(), now);
            assert_eq!(keepalive.on_deadline(now), Action::SendPing);
            keepalive.on_pong(now);
        }
    }

    #[test]
    fn peer_without_answer_fails_after_the_timeout() {
        let (mut keepalive, _, start) = keepalive();
        assert_eq!(keepalive.on_deadline(start + INTERVAL), Action::SendPing);
        assert_eq!(keepalive.on_deadline(start + INTERVAL * 2), Action::None);
        assert_eq!(
            keepalive.on_deadline(start + INTERVAL + TIMEOUT),
            Action::Fail
        );
    }

    #[test]
    fn peer_that_sends_is_not_pinged() {
        let (mut keepalive, received, start) = keepalive();
        received.record(start + INTERVAL / 2);
        assert_eq!(keepalive.on_deadline(start + INTERVAL), Action::None);
        let deadline = keepalive.next_deadline();
        assert_eq!(deadline, start + INTERVAL / 2 + INTERVAL);
        assert_eq!(keepalive.on_deadline(deadline), Action::SendPing);
    }

    #[test]
    fn received_bytes_extend_the_timeout_of_a_ping() {
        let (mut keepalive, received, start) = keepalive();
        assert_eq!(keepalive.on_deadline(start + INTERVAL), Action::SendPing);
        let last = start + INTERVAL + TIMEOUT / 2;
        received.record(last);
        assert_eq!(
            keepalive.on_deadline(start + INTERVAL + TIMEOUT),
            Action::None
        );
        assert_eq!(keepalive.on_deadline(last + TIMEOUT), Action::Fail);
    }

    #[test]
    fn silent_suspect_is_pinged_at_once_avoided_soon_and_fails_after_the_timeout() {
        let (mut keepalive, _, start) = keepalive();
        assert!(keepalive.suspect(start));
        assert!(
            !keepalive.suspect(start + SUSPECT_TIMEOUT / 2),
            "a second ping while one is in flight"
        );
        assert_eq!(keepalive.next_deadline(), start + SUSPECT_TIMEOUT);
        assert_eq!(
            keepalive.on_deadline(start + SUSPECT_TIMEOUT),
            Action::Avoid
        );
        assert_eq!(keepalive.on_deadline(start + SUSPECT_TIMEOUT), Action::None);
        assert_eq!(keepalive.on_deadline(start + TIMEOUT), Action::Fail);
    }

    #[test]
    fn suspect_that_sends_is_no_longer_suspected() {
        let (mut keepalive, received, start) = keepalive();
        assert!(keepalive.suspect(start));
        received.record(start + SUSPECT_TIMEOUT / 2);
        keepalive.on_pong(start + SUSPECT_TIMEOUT / 2);
        assert_eq!(keepalive.on_deadline(start + SUSPECT_TIMEOUT), Action::None);
        assert_eq!(
            keepalive.next_deadline(),
            start + SUSPECT_TIMEOUT / 2 + INTERVAL
        );
    }
}
