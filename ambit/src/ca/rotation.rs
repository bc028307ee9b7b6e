//! Which authority signs, and which roots are handed out, while one replaces another. No clock and
//! no files: the time is passed in, so that every step can be tested.
//!
//! A new authority is taken over in three steps, none of which leaves a moment in which somebody
//! shows a certificate that somebody else cannot check:
//!
//! ```text
//! found        its roots are handed out with every certificate, beside the old ones
//! known        every certificate of before has expired, so whoever has one has the new roots:
//!              signing moves
//! forgotten    every certificate that the old authority signed has expired: its roots are no
//!              longer handed out
//! ```
//!
//! "Has expired" needs no more memory than the latest end of all certificates that were ever
//! signed, and asks nothing of how the holders renew theirs.

use std::sync::Arc;
use std::time::SystemTime;

use mesh::certs::{Authority, BundleError, TrustBundle};
use rustls_pki_types::CertificateDer;

/// A root that is handed out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedRoot {
    /// The root.
    pub root: CertificateDer<'static>,
    /// When everybody who holds a certificate has it.
    pub known_at: SystemTime,
    /// When it is no longer handed out; not set while an authority comes with it.
    pub until: Option<SystemTime>,
}

/// The authority that signs, the one that will, and the roots of both and of those before.
#[derive(Debug)]
pub struct Rotation {
    signing: Arc<Authority>,
    next: Option<(Arc<Authority>, SystemTime)>,
    roots: Vec<PublishedRoot>,
    last_end: SystemTime,
}

impl Rotation {
    /// The first authority: nobody holds a certificate yet.
    pub fn new(signing: Arc<Authority>, now: SystemTime) -> Self {
        Self::restored(signing, Vec::new(), now)
    }

    /// As it was when it was left: with these roots, and certificates that end no later than that.
    pub fn restored(
        signing: Arc<Authority>,
        roots: Vec<PublishedRoot>,
        last_end: SystemTime,
    ) -> Self {
        let mut rotation = Self {
            signing,
            next: None,
            roots,
            last_end,
        };
        rotation.publish();
        rotation
    }

    /// Takes over an authority that was found; true if that changes anything.
    pub fn found(&mut self, authority: &Arc<Authority>, now: SystemTime) -> bool {
        let awaited = self.next.as_ref().map_or(&self.signing, |(next, _)| next);
        if awaited == authority {
            return false;
        }
        let other = *authority != self.signing;
        self.next = other.then(|| (authority.clone(), now));
        self.publish();
        // A root that is new now is known when all that was signed before has ended.
        let own = self.roots.iter().filter(|published| {
            let roots = authority.bundle().roots();
            roots.contains(&published.root)
        });
        let known = own.map(|published| published.known_at).max();
        if let Some((_, at)) = &mut self.next {
            *at = known.unwrap_or(now).max(now);
        }
        self.advance(now);
        true
    }

    /// Does what is due; true if that changes anything.
    pub fn advance(&mut self, now: SystemTime) -> bool {
        let moves = self.next.take_if(|(_, at)| *at <= now);
        let moved = moves.is_some();
        if let Some((next, _)) = moves {
            self.signing = next;
            self.publish();
        }
        let before = self.roots.len();
        let kept = |published: &PublishedRoot| published.until.is_none_or(|until| now < until);
        self.roots.retain(kept);
        moved || self.roots.len() < before
    }

    /// A certificate is signed that ends at this time.
    pub fn note(&mut self, end: SystemTime) {
        self.last_end = self.last_end.max(end);
    }

    /// Who signs.
    pub fn signing(&self) -> &Arc<Authority> {
        &self.signing
    }

    /// Who will sign, and from when.
    pub fn next(&self) -> Option<(&Arc<Authority>, SystemTime)> {
        let (authority, at) = self.next.as_ref()?;
        Some((authority, *at))
    }

    /// The roots that are handed out.
    pub fn roots(&self) -> &[PublishedRoot] {
        &self.roots
    }

    /// The latest end of all certificates that were signed.
    pub fn last_end(&self) -> SystemTime {
        self.last_end
    }

    /// The roots as a bundle.
    ///
    /// # Errors
    /// Fails if there are too many of them.
    pub fn bundle(&self) -> Result<TrustBundle, BundleError> {
        TrustBundle::new(self.roots.iter().map(|published| published.root.clone()))
    }

    /// The roots of the two authorities stay; others go when nobody can need them any more.
    fn publish(&mut self) {
        let coming = self.next.iter().map(|(next, _)| next);
        let needed = || coming.clone().chain([&self.signing]);
        let roots = needed().flat_map(|authority| authority.bundle().roots());
        let mut wanted: Vec<CertificateDer<'static>> = roots.cloned().collect();
        for published in &mut self.roots {
            let still = wanted.contains(&published.root);
            published.until = match (still, published.until) {
                (true, _) => None,
                (false, Some(until)) => Some(until),
                (false, None) => Some(self.last_end),
            };
            wanted.retain(|root| *root != published.root);
        }
        for root in wanted {
            if self.roots.iter().all(|published| published.root != root) {
                self.roots.push(PublishedRoot {
                    root,
                    known_at: self.last_end,
                    until: None,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
