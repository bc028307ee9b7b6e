//! Where does the background work of the source run?

use std::pin::Pin;

use tokio::sync::mpsc;

/// A future that `CertificateSource::run` polls.
pub(super) type BackgroundTask = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Passes futures to `CertificateSource::run`. Unbounded: there is one task for each identity of the
/// node, and a few for the connection to the agent.
pub(super) type TaskSender = mpsc::UnboundedSender<BackgroundTask>;
