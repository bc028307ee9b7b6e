//! Plaintext detector: where, and how often, a marker crossed the wire unencrypted.
//!
//! It captures packets on the bridge, which cross-node traffic passes, and in every node's namespace,
//! where the pods' veth pairs end and which same-node traffic passes. An absent marker proves nothing
//! if the capture is broken. So suites also send markers between unmeshed pods, which the detector
//! must find.

use anyhow::{Context, Result, ensure};
use lab::{Capture, Lab, Location};

/// Running packet captures of a whole lab.
#[derive(Debug)]
pub struct Detector {
    captures: Vec<(Location, Capture)>,
}

/// How often a marker was captured unencrypted, by location.
#[derive(Debug, Clone)]
pub struct Occurrences(Vec<(Location, usize)>);

impl Detector {
    /// Starts captures on the bridge and all nodes.
    ///
    /// # Errors
    /// tcpdump does not start.
    pub fn start(lab: &Lab) -> Result<Self> {
        let nodes = lab.status()?.nodes;
        let locations = nodes
            .iter()
            .map(|node| Location::node(&node.name))
            .chain([Location::Fabric]);
        let capture = |at: Location| Ok((at.clone(), lab.capture(at, "tcp")?));
        Ok(Self {
            captures: locations.map(capture).collect::<Result<_>>()?,
        })
    }

    /// The occurrences of a marker so far.
    ///
    /// # Errors
    /// A capture is incomplete, so that an absent marker would mean nothing.
    pub fn occurrences(&self, marker: &str) -> Result<Occurrences> {
        let count = |(location, capture): &(Location, Capture)| {
            let count = capture
                .occurrences(marker)
                .with_context(|| format!("the capture at {location}"))?;
            Ok((location.clone(), count))
        };
        self.captures
            .iter()
            .map(count)
            .collect::<Result<_>>()
            .map(Occurrences)
    }

    /// Checks that the marker was not captured anywhere.
    ///
    /// # Errors
    /// It was; the error has the locations.
    pub fn ensure_unseen(&self, marker: &str) -> Result<()> {
        let occurrences = self.occurrences(marker)?;
        ensure!(
            occurrences.total() == 0,
            "{marker} crossed the wire unencrypted: {occurrences:?}"
        );
        Ok(())
    }
}

impl Occurrences {
    /// The number at all locations.
    pub fn total(&self) -> usize {
        self.0.iter().map(|(_, count)| count).sum()
    }

    /// The number at one location.
    pub fn at(&self, location: &Location) -> usize {
        self.0
            .iter()
            .filter(|(at, _)| at == location)
            .map(|(_, count)| count)
            .sum()
    }
}
