//! When to ping a tunnel's peer, and when to give it up.
//!
//! A peer that sends anything is alive, so only silence is answered by a ping. This is more than thrift. h2 reads no
//! further frame while it has a ping, or the answer to one, that it cannot write; and it cannot write while the kernel's
//! buffer is full, which it stays if the other end does not read either. Two ends that ping in the midst of bulk in both
//! directions may so wait for each other until both are declared dead. For this both must have something of the kind to
//! write. A peer that pings us as it pleases, as Istio's server does each 10 s, cannot bring that about alone: we owe it
//! an answer only after its ping has left it, and then it has nothing more to write before it reads; so it reads on, and
//! our answer leaves.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

/// When bytes of a tunnel's peer last came: written by the socket's reader, read by all who judge the tunnel.
#[derive(Clone)]
pub(super) struct Pulse(Rc<Cell<Instant>>);

impl Pulse {
    pub(super) fn new(now: Instant) -> Self {
        Self(Rc::new(Cell::new(now)))
    }

    /// Bytes have come.
    pub(super) fn felt(&self, now: Instant) {
        self.0.set(now);
    }

    pub(super) fn last(&self) -> Instant {
        self.0.get()
    }
}

/// How long a peer under suspicion may still be silent after a ping before it is avoided: well above a round trip and
/// what a busy node takes.
const PROOF: Duration = Duration::from_secs(2);

/// What is due.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Beat {
    /// Send a ping.
    Ping,
    /// The peer was silent for too long after the last ping.
    Dead,
    /// A peer under suspicion has not shown that it lives. It may yet.
    Unproven,
    /// Nothing yet: a sleeper woke early, or the peer has been heard meanwhile.
    Nothing,
}

/// The times of one tunnel's pings. One ping is on its way at a time.
pub(super) struct Heart {
    interval: Duration,
    timeout: Duration,
    pulse: Pulse,
    /// When the last ping was sent, or answered.
    last: Instant,
    waiting: bool,
    /// Since when the peer is under suspicion.
    doubted: Option<Instant>,
}

impl Heart {
    /// Pings after `interval` of silence, and gives the peer up after a further `timeout` of it.
    pub(super) fn new(interval: Duration, timeout: Duration, pulse: Pulse) -> Self {
        Self {
            interval,
            timeout,
            last: pulse.last(),
            pulse,
            waiting: false,
            doubted: None,
        }
    }

    /// Somebody waits for this peer in vain. True if it should be pinged now.
    #[must_use]
    pub(super) fn doubt(&mut self, now: Instant) -> bool {
        self.doubted.get_or_insert(now);
        let asked = std::mem::replace(&mut self.waiting, true);
        if !asked {
            self.last = now;
        }
        !asked
    }

    /// When [`Heart::beat`] has something to say, if the peer stays silent until then.
    pub(super) fn due(&self) -> Instant {
        let limit = if self.waiting {
            self.timeout
        } else {
            self.interval
        };
        let due = self.last.max(self.pulse.last()) + limit;
        self.doubted.map_or(due, |doubted| due.min(doubted + PROOF))
    }

    pub(super) fn beat(&mut self, now: Instant) -> Beat {
        if now < self.due() {
            return Beat::Nothing;
        }
        if let Some(doubted) = self.doubted
            && now >= doubted + PROOF
        {
            self.doubted = None;
            return if self.pulse.last() > doubted {
                Beat::Nothing
            } else {
                Beat::Unproven
            };
        }
        if self.waiting {
            return Beat::Dead;
        }
        (self.waiting, self.last) = (true, now);
        Beat::Ping
    }

    /// The peer has answered.
    pub(super) fn pong(&mut self, now: Instant) {
        (self.waiting, self.last) = (false, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);
    const TIMEOUT: Duration = Duration::from_secs(20);

    fn heart() -> (Heart, Pulse, Instant) {
        let start = Instant::now();
        let pulse = Pulse::new(start);
        (Heart::new(INTERVAL, TIMEOUT, pulse.clone()), pulse, start)
    }

    #[test]
    fn a_peer_that_answers_is_pinged_again_and_again() {
        let (mut heart, _, start) = heart();
        for n in 1..5 {
            let now = start + INTERVAL * n;
            assert_eq!(heart.due(), now);
            assert_eq!(heart.beat(now), Beat::Ping);
            heart.pong(now);
        }
    }

    #[test]
    fn a_peer_that_does_not_answer_is_dead_after_the_timeout() {
        let (mut heart, _, start) = heart();
        assert_eq!(heart.beat(start + INTERVAL), Beat::Ping);
        assert_eq!(heart.beat(start + INTERVAL * 2), Beat::Nothing);
        assert_eq!(heart.beat(start + INTERVAL + TIMEOUT), Beat::Dead);
    }

    #[test]
    fn a_peer_that_sends_is_not_pinged() {
        let (mut heart, pulse, start) = heart();
        pulse.felt(start + INTERVAL / 2);
        assert_eq!(heart.beat(start + INTERVAL), Beat::Nothing);
        assert_eq!(heart.due(), start + INTERVAL / 2 + INTERVAL);
        assert_eq!(heart.beat(heart.due()), Beat::Ping);
    }

    #[test]
    fn a_peer_that_sends_but_is_late_with_its_answer_is_not_dead() {
        let (mut heart, pulse, start) = heart();
        assert_eq!(heart.beat(start + INTERVAL), Beat::Ping);
        let last_heard = start + INTERVAL + TIMEOUT / 2;
        pulse.felt(last_heard);
        assert_eq!(heart.beat(start + INTERVAL + TIMEOUT), Beat::Nothing);
        assert_eq!(heart.beat(last_heard + TIMEOUT), Beat::Dead);
    }

    #[test]
    fn a_peer_under_suspicion_is_pinged_at_once_and_avoided_soon_and_dead_no_sooner() {
        let (mut heart, _, start) = heart();
        assert!(heart.doubt(start));
        assert!(!heart.doubt(start + PROOF / 2), "it was pinged already");
        assert_eq!(heart.due(), start + PROOF);
        assert_eq!(heart.beat(start + PROOF), Beat::Unproven);
        assert_eq!(heart.beat(start + PROOF), Beat::Nothing);
        assert_eq!(heart.beat(start + TIMEOUT), Beat::Dead);
    }

    #[test]
    fn a_peer_under_suspicion_that_sends_anything_is_trusted_again() {
        let (mut heart, pulse, start) = heart();
        assert!(heart.doubt(start));
        pulse.felt(start + PROOF / 2);
        heart.pong(start + PROOF / 2);
        assert_eq!(heart.beat(start + PROOF), Beat::Nothing);
        assert_eq!(heart.due(), start + PROOF / 2 + INTERVAL);
    }
}
