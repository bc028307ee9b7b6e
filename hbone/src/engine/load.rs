//! How busy a tunnel is.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// Bytes that a tunnel has moved lately.
#[derive(Default)]
pub(super) struct Load {
    since: Cell<Option<Instant>>,
    current: Cell<usize>,
    last: Cell<usize>,
}

/// The time over which bytes are summed up.
const LOAD_WINDOW: Duration = Duration::from_millis(100);

/// 160 Mbit/s. One core drives a tunnel at some 3 Gbit/s, so this is one that already takes a visible part of it.
const BUSY: usize = 2 * 1024 * 1024;

impl Load {
    pub(super) fn add(&self, n: usize) {
        self.rotate(Instant::now());
        self.current.set(self.current.get() + n);
    }

    pub(super) fn busy(&self, now: Instant) -> bool {
        self.rotate(now);
        self.current.get().max(self.last.get()) >= BUSY
    }

    fn rotate(&self, now: Instant) {
        let age = now - self.since.get().unwrap_or(now);
        if self.since.get().is_none() || age >= LOAD_WINDOW {
            let last = if age < LOAD_WINDOW * 2 {
                self.current.get()
            } else {
                0
            };
            self.last.set(last);
            self.current.set(0);
            self.since.set(Some(now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_is_busy_while_it_moves_bytes_and_soon_after_no_more() {
        let (load, start) = (Load::default(), Instant::now());
        assert!(!load.busy(start));
        load.current.set(BUSY);
        assert!(load.busy(start));
        assert!(load.busy(start + LOAD_WINDOW));
        assert!(!load.busy(start + LOAD_WINDOW * 2));
        load.current.set(BUSY);
        assert!(!load.busy(start + LOAD_WINDOW * 20));
    }
}
