//! The access log: one line per connection, when it has ended, with Istio's fields in Istio's order
//! and our reason code.

use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use tracing::Level;

use super::labels::Parties;
use super::line::{Fields, Format};
use crate::dataplane::Direction;

/// A connection that has ended.
pub(crate) struct Ended<'a> {
    /// Who took part.
    pub(crate) parties: &'a Parties,
    /// Who opened it.
    pub(crate) source: SocketAddr,
    /// Where it went on the network; the tunnel's address if it was in one.
    pub(crate) destination: SocketAddr,
    /// What the CONNECT inside the tunnel asked for.
    pub(crate) hbone: Option<&'a dyn Display>,
    /// Bytes from the opener to the destination.
    pub(crate) sent: u64,
    /// Bytes from the destination to the opener.
    pub(crate) received: u64,
    /// How long it lived.
    pub(crate) duration: Duration,
    /// What went wrong, for people.
    pub(crate) error: Option<&'a dyn Display>,
    /// How it ended, for machines.
    pub(crate) reason: &'a str,
    /// The policy that denied it.
    pub(crate) policy: Option<&'a str>,
}

impl Ended<'_> {
    /// The level that the line has: failures are errors, as in the peer.
    pub(super) fn level(&self) -> Level {
        if self.error.is_some() {
            Level::ERROR
        } else {
            Level::INFO
        }
    }

    pub(super) fn line(&self, format: Format) -> String {
        self.fields(format)
            .line(self.level(), "access", "connection complete")
    }

    fn fields(&self, format: Format) -> Fields {
        let mut fields = Fields::new(format);
        let Parties {
            reporter,
            source,
            source_identity,
            destination,
            service,
            mutual_tls,
        } = self.parties;
        fields.bare("src.addr", self.source);
        if let Some(source) = source {
            fields.text("src.workload", &source.name);
            fields.text("src.namespace", &source.namespace);
        }
        if let Some(identity) = source_identity.as_ref().filter(|_| *mutual_tls) {
            fields.text("src.identity", &identity.to_string());
        }
        if let Some(source) = source {
            fields.text("src.cluster", &source.cluster);
        }
        fields.bare("dst.addr", self.destination);
        if let Some(hbone) = self.hbone {
            fields.bare("dst.hbone_addr", hbone);
        }
        if let Some(service) = service {
            fields.text("dst.service", &service.hostname);
        }
        if let Some(destination) = destination {
            fields.text("dst.workload", &destination.name);
            fields.text("dst.namespace", &destination.namespace);
            if *mutual_tls {
                fields.text("dst.identity", &destination.identity.to_string());
            }
            fields.text("dst.cluster", &destination.cluster);
        }
        fields.text("direction", reporter.name());
        // Seen from the pod: what it sent and what it received.
        let (pod_sent, pod_received) = match reporter {
            Direction::Outbound => (self.sent, self.received),
            Direction::Inbound => (self.received, self.sent),
        };
        fields.number("bytes_sent", pod_sent);
        fields.number("bytes_recv", pod_received);
        fields.text("duration", &format!("{}ms", self.duration.as_millis()));
        if let Some(error) = self.error {
            fields.text("error", &error.to_string());
        }
        fields.text("reason", self.reason);
        if let Some(policy) = self.policy {
            fields.text("policy", policy);
        }
        fields
    }
}
