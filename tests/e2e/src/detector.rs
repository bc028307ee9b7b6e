//! The plaintext detector: what of a marker crossed the wire in clear, and where.
//!
//! It records the bridge, where cross-node traffic passes, and every node's own side, where the
//! pods' veths end and same-node traffic passes. A detector that sees nothing proves nothing, so
//! suites send markers that must be seen, between unmeshed pods, beside those that must not be.

use anyhow::{Context, Result, ensure};
use lab::{Capture, Lab, Location};

/// Recordings of a whole lab, running.
#[derive(Debug)]
pub struct Detector {
    captures: Vec<(Location, Capture)>,
}

/// How often a marker was seen in clear, in each place.
#[derive(Debug, Clone)]
pub struct Occurrences(Vec<(Location, usize)>);

impl Detector {
    /// Records the bridge and all nodes from now on.
    ///
    /// # Errors
    /// tcpdump does not start.
    pub fn start(lab: &Lab) -> Result<Self> {
        let nodes = lab.status()?.nodes;
        let places = nodes
            .iter()
            .map(|node| Location::node(&node.name))
            .chain([Location::Fabric]);
        let capture = |place: Location| Ok((place.clone(), lab.capture(place, "tcp")?));
        Ok(Self {
            captures: places.map(capture).collect::<Result<_>>()?,
        })
    }

    /// Location the marker was seen up to now.
    ///
    /// # Errors
    /// A recording is not complete, so that "not seen" would mean nothing.
    pub fn occurrences(&self, marker: &str) -> Result<Occurrences> {
        let look = |(place, capture): &(Location, Capture)| {
            let seen = capture
                .occurrences(marker)
                .with_context(|| format!("the detector at {place}"))?;
            Ok((place.clone(), seen))
        };
        self.captures
            .iter()
            .map(look)
            .collect::<Result<_>>()
            .map(Occurrences)
    }

    /// The marker must not have been seen anywhere.
    ///
    /// # Errors
    /// It was; the error says where.
    pub fn ensure_unseen(&self, marker: &str) -> Result<()> {
        let seen = self.occurrences(marker)?;
        ensure!(
            seen.total() == 0,
            "in clear on the wire: {marker}: {seen:?}"
        );
        Ok(())
    }
}

impl Occurrences {
    /// In all places together.
    pub fn total(&self) -> usize {
        self.0.iter().map(|(_, seen)| seen).sum()
    }

    /// In one place.
    pub fn at(&self, place: &Location) -> usize {
        self.0
            .iter()
            .filter(|(at, _)| at == place)
            .map(|(_, seen)| seen)
            .sum()
    }
}
