//! Tunnels that come in and whose peers have not proven yet who they are. Whoever reaches the pod can
//! make these, with nothing but a SYN, so they are counted apart from its connections: a flood of
//! them takes nobody's place but their own.
//!
//! One too many pushes out the oldest. A peer that means it is done in milliseconds and long gone from
//! here by then; one that holds its handshake open is not.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use tokio_util::sync::CancellationToken;

/// The unproven tunnels of one pod on one worker.
pub(crate) struct Unproven {
    most: usize,
    queue: RefCell<Queue>,
}

#[derive(Default)]
struct Queue {
    newest: u64,
    /// By age, the oldest first.
    tunnels: BTreeMap<u64, CancellationToken>,
}

impl Unproven {
    /// Room for `most`, and for one at least.
    pub(super) fn new(most: usize) -> Rc<Self> {
        Rc::new(Self {
            most: most.max(1),
            queue: RefCell::default(),
        })
    }

    /// Enters a tunnel, which `push_out` ends if others come and it is the oldest.
    pub(crate) fn enter(self: &Rc<Self>, push_out: CancellationToken) -> Place {
        let mut queue = self.queue.borrow_mut();
        while queue.tunnels.len() >= self.most {
            if let Some((_, oldest)) = queue.tunnels.pop_first() {
                oldest.cancel();
            }
        }
        queue.newest += 1;
        let key = queue.newest;
        queue.tunnels.insert(key, push_out);
        Place {
            of: self.clone(),
            key,
        }
    }
}

/// A tunnel's place among the unproven; given back on drop.
pub(crate) struct Place {
    of: Rc<Unproven>,
    key: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of.queue.borrow_mut().tunnels.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_too_many_pushes_out_the_oldest_and_who_has_proven_itself_is_safe() {
        let unproven = Unproven::new(2);
        let tokens: Vec<_> = (0..4).map(|_| CancellationToken::new()).collect();
        let ended = || tokens.iter().map(CancellationToken::is_cancelled);
        let proven = unproven.enter(tokens[0].clone());
        drop(proven);
        let _waiting: Vec<_> = tokens[1..]
            .iter()
            .map(|token| unproven.enter(token.clone()))
            .collect();
        assert!(ended().eq([false, true, false, false]));
    }
}
