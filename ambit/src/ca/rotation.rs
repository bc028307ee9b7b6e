//! Which authority signs, and which roots are distributed, while one authority replaces another?
//!
//! A new authority takes over in three steps. At no time does a workload present a certificate that
//! another workload cannot verify:
//!
//! ```text
//! distribute   the new roots go out with every certificate, in addition to the old ones
//! sign         every certificate issued before the first step has expired, so every holder of a
//!              certificate has the new roots: the new authority signs
//! withdraw     every certificate of the old authority has expired: its roots no longer go out
//! ```
//!
//! "Has expired" needs only the latest expiry of all certificates issued, and does not depend on when
//! their holders renew them.
//!
//! The module has no clock and no files: the time is a parameter, so that tests cover every step.

use std::sync::Arc;
use std::time::SystemTime;

use mesh::certs::{Authority, BundleError, TrustBundle};
use rustls_pki_types::CertificateDer;

/// A root that is distributed with certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedRoot {
    /// The root.
    pub root: CertificateDer<'static>,
    /// From then on every holder of a valid certificate has this root.
    pub propagated_at: SystemTime,
    /// When it is withdrawn; `None` while the signing or the next authority needs it.
    pub withdraw_at: Option<SystemTime>,
}

/// The authority that replaces the signing one.
#[derive(Clone, Debug)]
pub struct NextAuthority {
    /// The authority.
    pub authority: Arc<Authority>,
    /// When it starts to sign.
    pub signs_at: SystemTime,
}

/// The signing authority, its successor, and the roots of both and of their predecessors.
#[derive(Debug)]
pub struct RootRotation {
    signing: Arc<Authority>,
    next: Option<NextAuthority>,
    roots: Vec<PublishedRoot>,
    latest_expiry: SystemTime,
}

impl RootRotation {
    /// A first authority, which has not issued any certificate.
    pub fn new(signing: Arc<Authority>, now: SystemTime) -> Self {
        Self::restore(signing, Vec::new(), now)
    }

    /// The state before a restart: the signing authority, the published roots, and the latest expiry
    /// of all certificates issued.
    pub fn restore(
        signing: Arc<Authority>,
        roots: Vec<PublishedRoot>,
        latest_expiry: SystemTime,
    ) -> Self {
        let mut rotation = Self {
            signing,
            next: None,
            roots,
            latest_expiry,
        };
        rotation.update_roots();
        rotation
    }

    /// Starts to replace the signing authority by this one. Returns whether anything changed. With
    /// the signing authority itself, a replacement under way is cancelled.
    pub fn replace_with(&mut self, authority: &Arc<Authority>, now: SystemTime) -> bool {
        if self.latest_authority() == authority {
            return false;
        }
        self.next = (*authority != self.signing).then(|| NextAuthority {
            authority: authority.clone(),
            signs_at: now,
        });
        self.update_roots();
        // A root that is published now has propagated when all earlier certificates have expired.
        let own_roots = self
            .roots
            .iter()
            .filter(|published| authority.bundle().roots().contains(&published.root));
        let propagated_at = own_roots.map(|published| published.propagated_at).max();
        if let Some(next) = &mut self.next {
            next.signs_at = propagated_at.unwrap_or(now).max(now);
        }
        self.advance(now);
        true
    }

    /// Takes the steps that are due. Returns whether anything changed.
    pub fn advance(&mut self, now: SystemTime) -> bool {
        let due = self.next.take_if(|next| next.signs_at <= now);
        let has_moved = due.is_some();
        if let Some(next) = due {
            self.signing = next.authority;
            self.update_roots();
        }
        let count = self.roots.len();
        self.roots
            .retain(|published| published.withdraw_at.is_none_or(|at| now < at));
        has_moved || self.roots.len() < count
    }

    /// Records that a certificate with this expiry is issued.
    pub fn record_issued(&mut self, expiry: SystemTime) {
        self.latest_expiry = self.latest_expiry.max(expiry);
    }

    /// The authority that signs.
    pub fn signing(&self) -> &Arc<Authority> {
        &self.signing
    }

    /// The authority that will sign next, if there is a replacement under way.
    pub fn next(&self) -> Option<&NextAuthority> {
        self.next.as_ref()
    }

    /// The authority that signs when the replacement is complete.
    pub fn latest_authority(&self) -> &Arc<Authority> {
        match &self.next {
            Some(next) => &next.authority,
            None => &self.signing,
        }
    }

    /// The roots to distribute.
    pub fn roots(&self) -> &[PublishedRoot] {
        &self.roots
    }

    /// The latest expiry of all certificates issued.
    pub fn latest_expiry(&self) -> SystemTime {
        self.latest_expiry
    }

    /// The roots as a bundle.
    ///
    /// # Errors
    /// Fails if there are too many of them.
    pub fn bundle(&self) -> Result<TrustBundle, BundleError> {
        TrustBundle::new(self.roots.iter().map(|published| published.root.clone()))
    }

    /// Publishes the roots of the signing and the next authority. Schedules the withdrawal of all
    /// others, once no valid certificate needs them.
    fn update_roots(&mut self) {
        let next = self.next.iter().map(|next| &next.authority);
        let authorities = next.chain([&self.signing]);
        let roots = authorities.flat_map(|authority| authority.bundle().roots());
        let mut required: Vec<CertificateDer<'static>> = roots.cloned().collect();
        for published in &mut self.roots {
            published.withdraw_at = match required.contains(&published.root) {
                true => None,
                false => published.withdraw_at.or(Some(self.latest_expiry)),
            };
            required.retain(|root| *root != published.root);
        }
        for root in required {
            if self.roots.iter().all(|published| published.root != root) {
                self.roots.push(PublishedRoot {
                    root,
                    propagated_at: self.latest_expiry,
                    withdraw_at: None,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests;
