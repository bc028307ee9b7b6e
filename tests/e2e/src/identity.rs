//! Certificates under load: traffic that runs while certificates change, a record of which certificate was held when,
//! and a check of every connection that failed.

mod cert_status;
mod failures;
mod fixture;
mod load;
mod secrets;
mod timeline;

pub use cert_status::{CertStatus, cert_status, roots};
pub use failures::{LoadPath, NO_CERTIFICATE_REASONS};
pub use fixture::{
    BackgroundLoad, NODES, PATHS, finish_and_check_failures, finish_without_failures, identity,
    manifests, up,
};
pub use load::{ConnectionRecord, EchoStream, ShortConnections};
pub use secrets::check_no_secrets_exposed;
pub use timeline::{CertTimeline, TimelineRecorder, unix_now};
