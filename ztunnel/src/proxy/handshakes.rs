//! Limits the inbound tunnels of a pod that are in their handshakes.
//!
//! A client needs nothing but a SYN to open one, so they are counted apart from the pod's
//! connections: a flood of handshakes evicts handshakes and no connection.
//!
//! At the limit, a new handshake evicts the oldest. A peer that completes its handshake does so in
//! milliseconds and has left the queue by then; one that holds its handshake open has not.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use tokio_util::sync::CancellationToken;

/// The handshakes of one pod on one worker.
pub(crate) struct HandshakeLimiter {
    max: usize,
    queue: RefCell<Queue>,
}

#[derive(Default)]
struct Queue {
    last_key: u64,
    /// By age, the oldest first.
    handshakes: BTreeMap<u64, CancellationToken>,
}

impl HandshakeLimiter {
    /// Allows `max` handshakes at a time, and at least one.
    pub(super) fn new(max: usize) -> Rc<Self> {
        Rc::new(Self {
            max: max.max(1),
            queue: RefCell::default(),
        })
    }

    /// Admits a handshake. `evict` is cancelled if later handshakes need its place.
    pub(super) fn admit(self: &Rc<Self>, evict: CancellationToken) -> HandshakePermit {
        let mut queue = self.queue.borrow_mut();
        while queue.handshakes.len() >= self.max {
            if let Some((_, oldest)) = queue.handshakes.pop_first() {
                oldest.cancel();
            }
        }
        queue.last_key += 1;
        let key = queue.last_key;
        queue.handshakes.insert(key, evict);
        HandshakePermit {
            limiter: self.clone(),
            key,
        }
    }
}

/// Permits one handshake; released on drop.
pub(super) struct HandshakePermit {
    limiter: Rc<HandshakeLimiter>,
    key: u64,
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        self.limiter.queue.borrow_mut().handshakes.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshake_over_the_limit_evicts_the_oldest_that_is_not_complete() {
        let limiter = HandshakeLimiter::new(2);
        let tokens: Vec<_> = (0..4).map(|_| CancellationToken::new()).collect();
        let evicted = || tokens.iter().map(CancellationToken::is_cancelled);
        let complete = limiter.admit(tokens[0].clone());
        drop(complete);
        let _pending: Vec<_> = tokens[1..]
            .iter()
            .map(|token| limiter.admit(token.clone()))
            .collect();
        assert!(evicted().eq([false, true, false, false]));
    }
}
