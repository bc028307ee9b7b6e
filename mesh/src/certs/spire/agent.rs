//! The connection to the agent. One for all subscriptions; made with the first request, and again
//! with the next request after it broke.

use std::error::Error;
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

use super::{Job, Jobs};

/// How long the agent may take to accept a connection; it is a process of this machine.
const CONNECT: Duration = Duration::from_secs(2);
/// Longest answer that is read. An answer holds a few SVIDs of some kilobytes each, or the bundles
/// of all federated trust domains.
const MESSAGE_MAX: usize = 1024 * 1024;

/// Why SPIRE gave nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// Stable reason code.
    pub(super) code: &'static str,
    /// For the operator.
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(code: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }
}

/// The agent of this node. Clones share one connection.
#[derive(Clone)]
pub(super) struct Agent {
    client: DelegatedIdentityClient<Channel>,
    socket: PathBuf,
}

/// Which workload is meant: what SPIRE's own attestor would say of a pod of this service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceAccount {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl ServiceAccount {
    /// Whose identity this is, if it is one of a service account of this trust domain.
    pub(super) fn of(identity: &SpiffeId, own: &TrustDomain) -> Option<Self> {
        let path = identity.path().strip_prefix("/ns/")?;
        let (namespace, name) = path.split_once("/sa/")?;
        let plain = |part: &str| !part.is_empty() && !part.contains('/');
        let ours = identity.trust_domain() == own && plain(namespace) && plain(name);
        ours.then(|| Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }
}

impl Agent {
    /// What the connection does by itself is handed in as `jobs`.
    pub(super) fn new(socket: &Path, jobs: Jobs) -> Self {
        // The authority is asked for by HTTP, and means nothing on a socket of this machine.
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(CONNECT)
            .executor(Executor(jobs))
            .connect_with_connector_lazy(Connector(socket.to_owned()));
        Self {
            client: DelegatedIdentityClient::new(channel).max_decoding_message_size(MESSAGE_MAX),
            socket: socket.to_owned(),
        }
    }

    /// The SVIDs of a workload, now and whenever they change.
    pub(super) async fn svids(
        &self,
        workload: &ServiceAccount,
    ) -> Result<Streaming<SubscribeToX509sviDsResponse>, Failure> {
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

    /// The bundles of all trust domains the agent knows, now and whenever they change.
    pub(super) async fn bundles(
        &self,
    ) -> Result<Streaming<SubscribeToX509BundlesResponse>, Failure> {
        let request = SubscribeToX509BundlesRequest {};
        let opened = self.client.clone().subscribe_to_x509_bundles(request).await;
        Ok(opened.map_err(|status| self.failure(&status))?.into_inner())
    }

    /// What the next message of a stream is, or why there is none.
    pub(super) fn next<T>(&self, message: Result<Option<T>, Status>) -> Result<T, Failure> {
        match message {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(self.unreachable("it ended the subscription")),
            Err(status) => Err(self.failure(&status)),
        }
    }

    /// For an agent that took a request and said nothing for so long.
    pub(super) fn silent(&self, waited: Duration) -> Failure {
        let socket = self.socket.display();
        let message = format!(
            "the agent at {socket} has not answered for {waited:?}; it may be waiting for its server"
        );
        Failure::new("spire_silent", message)
    }

    fn unreachable(&self, why: &str) -> Failure {
        let socket = self.socket.display();
        Failure::new("spire_unreachable", format!("the agent at {socket}: {why}"))
    }

    fn failure(&self, status: &Status) -> Failure {
        let (socket, said) = (self.socket.display(), told(status));
        match status.code() {
            Code::PermissionDenied | Code::Unauthenticated => Failure::new(
                "spire_denied",
                format!(
                    "the agent at {socket} denies: {said}; does this daemon have an entry, and is its id among the agent's authorized_delegates?"
                ),
            ),
            // What a transport that broke is reported as, depending on when it broke.
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted => {
                self.unreachable(&said)
            }
            Code::DeadlineExceeded => Failure::new("spire_silent", said),
            code => Failure::new(
                "spire_failed",
                format!("the agent at {socket} failed ({code:?}): {said}"),
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

/// Longest text of the agent that is repeated in a message.
const TOLD_MAX: usize = 256;

/// What a status says, down to the cause of its causes: "transport error" alone tells nobody that
/// a socket is missing.
fn told(status: &Status) -> String {
    let mut told = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !told.contains(&text) {
            told = format!("{told}: {text}");
        }
        cause = error.source();
    }
    told.chars()
        .filter(|c| !c.is_control())
        .take(TOLD_MAX)
        .collect()
}

/// Connects to the agent's socket.
struct Connector(PathBuf);

impl tower_service::Service<Uri> for Connector {
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

/// Gives the connection's own work to whoever drives the source, instead of to the runtime.
struct Executor(Jobs);

impl hyper::rt::Executor<Job> for Executor {
    fn execute(&self, job: Job) {
        // Nobody is there to drive it only when nobody is there to ask.
        let _ = self.0.send(job);
    }
}
