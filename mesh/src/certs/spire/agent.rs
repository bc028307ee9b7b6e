//! How does this daemon call the agent, and which reason code does a failed call get?
//!
//! All subscriptions share one connection. The first request opens it, and the first request after a
//! failure opens it again.

use std::fmt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use spiffe::{SpiffeId, TrustDomain};
use spire_api::pb::spire::api::agent::delegatedidentity::v1::delegated_identity_client::DelegatedIdentityClient;
use spire_api::pb::spire::api::agent::delegatedidentity::v1::{
    SubscribeToX509BundlesRequest, SubscribeToX509BundlesResponse, SubscribeToX509sviDsRequest,
    SubscribeToX509sviDsResponse,
};
use spire_api::selectors::{K8s, Selector};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use super::background::{BackgroundTask, TaskSender};
use crate::certs::grpc_status::error_chain;
use crate::certs::source::IssueFailure;

/// The agent is a process on this machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A response holds a few SVIDs of some kilobytes each, or the bundles of all federated trust
/// domains.
const MAX_RESPONSE_BYTES: usize = 1024 * 1024;
/// Longest text of the agent's error that is logged.
const MAX_MESSAGE_CHARS: usize = 256;

/// A client of the node's agent. Clones share one connection.
#[derive(Clone)]
pub(super) struct Agent {
    client: DelegatedIdentityClient<Channel>,
    socket: PathBuf,
}

/// The service account of a workload, which SPIRE's workload attestor reports for its pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceAccount {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl ServiceAccount {
    /// The service account of an identity, if it belongs to one of this trust domain.
    pub(super) fn of(identity: &SpiffeId, trust_domain: &TrustDomain) -> Option<Self> {
        let path = identity.path().strip_prefix("/ns/")?;
        let (namespace, name) = path.split_once("/sa/")?;
        let is_name = |part: &str| !part.is_empty() && !part.contains('/');
        let is_own = identity.trust_domain() == trust_domain && is_name(namespace) && is_name(name);
        is_own.then(|| Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }
}

impl Agent {
    /// A client. The background work of its connection is sent to `tasks`.
    pub(super) fn new(socket: &Path, tasks: TaskSender) -> Self {
        // HTTP requires an authority. It has no meaning on a Unix socket.
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(CONNECT_TIMEOUT)
            .executor(Executor(tasks))
            .connect_with_connector_lazy(UnixConnector(socket.to_owned()));
        let client = DelegatedIdentityClient::new(channel);
        Self {
            client: client.max_decoding_message_size(MAX_RESPONSE_BYTES),
            socket: socket.to_owned(),
        }
    }

    /// Streams the SVIDs of a workload: the current ones, and every change.
    pub(super) async fn svids(
        &self,
        workload: &ServiceAccount,
    ) -> Result<Streaming<SubscribeToX509sviDsResponse>, IssueFailure> {
        let selectors = [
            K8s::Namespace(workload.namespace.clone()),
            K8s::ServiceAccount(workload.name.clone()),
        ];
        let request = SubscribeToX509sviDsRequest {
            selectors: selectors.map(|s| Selector::K8s(s).into()).into(),
            pid: 0,
        };
        let opened = self.client.clone().subscribe_to_x509svi_ds(request).await;
        Ok(opened.map_err(|status| self.failure(&status))?.into_inner())
    }

    /// Streams the bundles of all trust domains that the agent has: the current ones, and every
    /// change.
    pub(super) async fn bundles(
        &self,
    ) -> Result<Streaming<SubscribeToX509BundlesResponse>, IssueFailure> {
        let request = SubscribeToX509BundlesRequest {};
        let opened = self.client.clone().subscribe_to_x509_bundles(request).await;
        Ok(opened.map_err(|status| self.failure(&status))?.into_inner())
    }

    /// The next message of a stream, or the reason for its end.
    pub(super) fn message<T>(&self, message: Result<Option<T>, Status>) -> Result<T, IssueFailure> {
        match message {
            Ok(Some(response)) => Ok(response),
            Ok(None) => Err(self.unreachable("it ended the subscription")),
            Err(status) => Err(self.failure(&status)),
        }
    }

    /// The failure of an agent that accepted a request and did not respond within `timeout`.
    pub(super) fn timed_out(&self, timeout: Duration) -> IssueFailure {
        let socket = self.socket.display();
        let message = format!(
            "the agent at {socket} has not responded within {timeout:?}; it may be waiting for the SPIRE server"
        );
        IssueFailure::new("spire_silent", message)
    }

    fn unreachable(&self, error: &str) -> IssueFailure {
        let socket = self.socket.display();
        IssueFailure::new(
            "spire_unreachable",
            format!("the agent at {socket}: {error}"),
        )
    }

    fn failure(&self, status: &Status) -> IssueFailure {
        let error = error_chain(status, MAX_MESSAGE_CHARS);
        let socket = self.socket.display();
        match status.code() {
            Code::PermissionDenied | Code::Unauthenticated => IssueFailure::new(
                "spire_denied",
                format!(
                    "the agent at {socket} denies access: {error}; check that this daemon has an entry, and that its id is in the agent's authorized_delegates"
                ),
            ),
            // The codes of a broken transport. They differ with the time of the failure.
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted => {
                self.unreachable(&error)
            }
            Code::DeadlineExceeded => IssueFailure::new("spire_silent", error),
            code => IssueFailure::new(
                "spire_failed",
                format!("the agent at {socket} failed ({code:?}): {error}"),
            ),
        }
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

/// Connects to a Unix socket.
struct UnixConnector(PathBuf);

impl tower_service::Service<Uri> for UnixConnector {
    type Response = TokioIo<UnixStream>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = std::io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let socket = self.0.clone();
        Box::pin(async move { Ok(TokioIo::new(UnixStream::connect(socket).await?)) })
    }
}

/// Sends the connection's background work to `CertificateSource::run` instead of the runtime.
struct Executor(TaskSender);

impl hyper::rt::Executor<BackgroundTask> for Executor {
    fn execute(&self, task: BackgroundTask) {
        // Fails only after `run` was dropped, when no request is sent any more.
        let _ = self.0.send(task);
    }
}
