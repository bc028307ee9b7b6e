//! Certificates: how a workload proves who it is.

mod certificate;
mod local_ca;
mod renewal;

pub use certificate::Certificate;
pub use local_ca::{LocalCa, LocalCaError};
pub use renewal::{CertificateSource, Certificates, CertificatesConfig, IssueError, RenewalTask};
