//! The access log: one line per connection, written when it ends, with Istio's fields in Istio's
//! order, followed by the reason code and the policy.

use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use tracing::Level;

use super::labels::{ConnectionLabels, Direction};
use super::line::{Fields, LogFormat};

/// A connection that has ended.
pub(crate) struct AccessLogEntry<'a> {
    pub(crate) labels: &'a ConnectionLabels,
    /// The client.
    pub(crate) source: SocketAddr,
    /// The address on the network; the tunnel's for a connection through one.
    pub(crate) destination: SocketAddr,
    /// The authority of the CONNECT.
    pub(crate) hbone: Option<&'a dyn Display>,
    /// Bytes from the client to the destination.
    pub(crate) sent: u64,
    /// Bytes from the destination to the client.
    pub(crate) received: u64,
    /// From the acceptance to the end.
    pub(crate) duration: Duration,
    /// The text of the failure.
    pub(crate) error: Option<&'a dyn Display>,
    /// The reason code.
    pub(crate) reason: &'a str,
    /// The policy that denied it.
    pub(crate) policy: Option<&'a str>,
}

impl AccessLogEntry<'_> {
    /// The level of the line: a failure is an error, as in Istio's ztunnel.
    pub(super) fn level(&self) -> Level {
        if self.error.is_some() {
            Level::ERROR
        } else {
            Level::INFO
        }
    }

    pub(super) fn line(&self, format: LogFormat) -> String {
        self.fields(format)
            .line(self.level(), "access", "connection complete")
    }

    fn fields(&self, format: LogFormat) -> Fields {
        let mut fields = Fields::new(format);
        self.add_source(&mut fields);
        self.add_destination(&mut fields);
        fields.text("direction", self.labels.reporter.name());
        // As the pod sees it: what the pod sent and what it received.
        let (pod_sent, pod_received) = match self.labels.reporter {
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

    fn add_source(&self, fields: &mut Fields) {
        let labels = self.labels;
        fields.bare("src.addr", self.source);
        if let Some(source) = &labels.source {
            fields.text("src.workload", &source.name);
            fields.text("src.namespace", &source.namespace);
        }
        if let Some(identity) = labels
            .source_identity
            .as_ref()
            .filter(|_| labels.mutual_tls)
        {
            fields.text("src.identity", &identity.to_string());
        }
        if let Some(source) = &labels.source {
            fields.text("src.cluster", &source.cluster);
        }
    }

    fn add_destination(&self, fields: &mut Fields) {
        let labels = self.labels;
        fields.bare("dst.addr", self.destination);
        if let Some(hbone) = self.hbone {
            fields.bare("dst.hbone_addr", hbone);
        }
        if let Some(service) = &labels.service {
            fields.text("dst.service", &service.hostname);
        }
        if let Some(destination) = &labels.destination {
            fields.text("dst.workload", &destination.name);
            fields.text("dst.namespace", &destination.namespace);
            if labels.mutual_tls {
                fields.text("dst.identity", &destination.identity.to_string());
            }
            fields.text("dst.cluster", &destination.cluster);
        }
    }
}
