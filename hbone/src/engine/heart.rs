//! When to ping a tunnel's peer, and when to give it up: pure.

use std::time::Duration;

use tokio::time::Instant;

/// What is due.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Beat {
    /// Send a ping.
    Ping,
    /// The last ping was not answered in time.
    Dead,
    /// Nothing yet: a sleeper woke early.
    Nothing,
}

/// The times of one tunnel's pings. One ping is on its way at a time.
pub(super) struct Heart {
    interval: Duration,
    timeout: Duration,
    /// When the last ping was sent, or answered.
    last: Instant,
    waiting: bool,
}

impl Heart {
    pub(super) fn new(interval: Duration, timeout: Duration, now: Instant) -> Self {
        Self {
            interval,
            timeout,
            last: now,
            waiting: false,
        }
    }

    /// When [`Heart::beat`] has something to say.
    pub(super) fn due(&self) -> Instant {
        self.last
            + if self.waiting {
                self.timeout
            } else {
                self.interval
            }
    }

    pub(super) fn beat(&mut self, now: Instant) -> Beat {
        if now < self.due() {
            return Beat::Nothing;
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

    #[test]
    fn a_peer_that_answers_is_pinged_again_and_again() {
        let start = Instant::now();
        let mut heart = Heart::new(INTERVAL, TIMEOUT, start);
        for n in 1..5 {
            let now = start + INTERVAL * n;
            assert_eq!(heart.due(), now);
            assert_eq!(heart.beat(now), Beat::Ping);
            heart.pong(now);
        }
    }

    #[test]
    fn a_peer_that_does_not_answer_is_dead_after_the_timeout() {
        let start = Instant::now();
        let mut heart = Heart::new(INTERVAL, TIMEOUT, start);
        assert_eq!(heart.beat(start + INTERVAL), Beat::Ping);
        assert_eq!(heart.beat(start + INTERVAL * 2), Beat::Nothing);
        assert_eq!(heart.beat(start + INTERVAL + TIMEOUT), Beat::Dead);
    }
}
