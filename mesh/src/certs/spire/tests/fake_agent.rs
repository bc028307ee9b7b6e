//! An agent whose replies are set by the test: the Delegated Identity API on a Unix socket.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::Stream;
use futures_util::stream::unfold;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use spiffe::SpiffeId;
use spire_api::pb::spire::api::agent::delegatedidentity::v1::{
    SubscribeToX509BundlesRequest, SubscribeToX509BundlesResponse, SubscribeToX509sviDsRequest,
    SubscribeToX509sviDsResponse, X509svidWithKey,
};
use spire_api::pb::spire::api::types::X509svid;
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::server::{Grpc, ServerStreamingService};
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::certs::{Authority, Validity};

/// The reply to a subscription for a workload.
#[derive(Clone)]
pub(super) enum Reply {
    Svids(Vec<X509svidWithKey>),
    /// Ends the subscription with this status.
    Error(Code, &'static str),
    /// Ends the subscription without an error.
    End,
    /// Sends nothing.
    Hang,
}

/// The reply for each workload `ns/sa`. Others have no entry.
type Entries = BTreeMap<String, Reply>;

/// The agent and its state.
pub(super) struct FakeAgent {
    pub(super) socket: PathBuf,
    pub(super) authority: Authority,
    entries: watch::Sender<Entries>,
    pub(super) bundles: watch::Sender<HashMap<String, Vec<u8>>>,
    /// The selectors of every subscription so far.
    subscribed: Arc<Mutex<Vec<String>>>,
    /// The number of open subscriptions.
    open: watch::Sender<usize>,
    serving: JoinSet<()>,
    _folder: TempDir,
}

impl FakeAgent {
    /// An agent with the bundle of its own trust domain.
    pub(super) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(&folder.path().join("ca")).unwrap();
        let roots = authority.bundle().roots().iter();
        let roots_der: Vec<u8> = roots.flat_map(|root| root.to_vec()).collect();
        let bundles = HashMap::from([("spiffe://cluster.local".to_owned(), roots_der)]);
        let mut agent = Self {
            socket: folder.path().join("admin.sock"),
            authority,
            entries: watch::Sender::default(),
            bundles: watch::Sender::new(bundles),
            subscribed: Arc::default(),
            open: watch::Sender::default(),
            serving: JoinSet::new(),
            _folder: folder,
        };
        agent.restart();
        agent
    }

    /// Closes all connections, as at the end of its process.
    pub(super) async fn stop(&mut self) {
        self.serving.shutdown().await;
        std::fs::remove_file(&self.socket).unwrap();
    }

    pub(super) fn restart(&mut self) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        let api = Api {
            entries: self.entries.subscribe(),
            bundles: self.bundles.subscribe(),
            subscribed: self.subscribed.clone(),
            open: self.open.clone(),
        };
        self.serving.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(api.clone().serve(stream));
            }
        });
    }

    pub(super) fn set_reply(&self, workload: &str, reply: Reply) {
        self.entries.send_modify(|entries| {
            entries.insert(workload.to_owned(), reply);
        });
    }

    pub(super) fn remove_entry(&self, workload: &str) {
        self.entries.send_modify(|entries| {
            entries.remove(workload);
        });
    }

    /// Sets a new SVID for the workload.
    pub(super) fn set_svid(&self, workload: &str, id: &SpiffeId, ttl: Duration) {
        self.set_reply(workload, Reply::Svids(vec![self.svid(id, ttl)]));
    }

    pub(super) fn svid(&self, id: &SpiffeId, ttl: Duration) -> X509svidWithKey {
        self.svid_until(id, SystemTime::now() + ttl)
    }

    pub(super) fn svid_until(&self, id: &SpiffeId, not_after: SystemTime) -> X509svidWithKey {
        let validity = Validity {
            not_before: not_after - Duration::from_secs(7200),
            not_after,
        };
        let issued = self.authority.issue(id, validity).unwrap();
        let chain = issued.chain.iter().map(|der| der.to_vec().into());
        X509svidWithKey {
            x509_svid: Some(X509svid {
                cert_chain: chain.collect(),
                ..X509svid::default()
            }),
            x509_svid_key: issued.key.to_vec().into(),
        }
    }

    /// The selectors of every subscription so far.
    pub(super) fn subscribed(&self) -> Vec<String> {
        self.subscribed.lock().unwrap().clone()
    }

    /// Waits until this many subscriptions for SVIDs are open.
    pub(super) async fn subscriptions(&self, count: usize) {
        let mut open = self.open.subscribe();
        open.wait_for(|open| *open == count).await.unwrap();
    }
}

/// The service of one connection.
#[derive(Clone)]
struct Api {
    entries: watch::Receiver<Entries>,
    bundles: watch::Receiver<HashMap<String, Vec<u8>>>,
    subscribed: Arc<Mutex<Vec<String>>>,
    open: watch::Sender<usize>,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;
type ReplyFuture<T> = std::future::Ready<Result<Response<Replies<T>>, Status>>;

impl Api {
    async fn serve(self, stream: tokio::net::UnixStream) {
        let service = service_fn(move |request| {
            let api = self.clone();
            async move { Ok::<_, Infallible>(api.reply(request).await) }
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        // The client may disconnect at any time.
        let _ = connection
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    async fn reply(self, request: http::Request<Incoming>) -> http::Response<tonic::body::Body> {
        match request.uri().path() {
            "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509SVIDs" => {
                let mut grpc = Grpc::new(ProstCodec::default());
                grpc.server_streaming(Svids(self), request).await
            }
            "/spire.api.agent.delegatedidentity.v1.DelegatedIdentity/SubscribeToX509Bundles" => {
                let mut grpc = Grpc::new(ProstCodec::default());
                grpc.server_streaming(Bundles(self), request).await
            }
            other => panic!("unknown method: {other}"),
        }
    }
}

struct Svids(Api);

/// Counts a subscription while it is open.
struct OpenGuard(watch::Sender<usize>);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

impl ServerStreamingService<SubscribeToX509sviDsRequest> for Svids {
    type Response = SubscribeToX509sviDsResponse;
    type ResponseStream = Replies<Self::Response>;
    type Future = ReplyFuture<Self::Response>;

    fn call(&mut self, request: Request<SubscribeToX509sviDsRequest>) -> Self::Future {
        let request = request.into_inner();
        assert_eq!(request.pid, 0);
        let selectors = request.selectors.iter();
        let selectors: Vec<_> = selectors
            .map(|s| format!("{}:{}", s.r#type, s.value))
            .collect();
        self.0.subscribed.lock().unwrap().push(selectors.join(" "));
        let [ns, sa] = selectors.as_slice() else {
            panic!("selectors {selectors:?}");
        };
        let (ns, sa) = (ns.strip_prefix("k8s:ns:"), sa.strip_prefix("k8s:sa:"));
        let workload = format!("{}/{}", ns.unwrap(), sa.unwrap());
        self.0.open.send_modify(|open| *open += 1);
        let state = (
            self.0.entries.clone(),
            workload,
            OpenGuard(self.0.open.clone()),
            None,
        );
        let replies = unfold(state, |(mut entries, workload, open, last)| async move {
            let mut current = last.is_none();
            let reply = loop {
                if !current {
                    entries.changed().await.ok()?;
                }
                current = false;
                let reply = entries.borrow_and_update().get(&workload).cloned();
                match reply.unwrap_or(Reply::Svids(Vec::new())) {
                    Reply::Hang => {}
                    Reply::End => return None,
                    Reply::Error(code, message) => break Err(Status::new(code, message)),
                    Reply::Svids(x509_svids) => {
                        break Ok(SubscribeToX509sviDsResponse {
                            x509_svids,
                            federates_with: Vec::new(),
                        });
                    }
                }
            };
            Some((reply, (entries, workload, open, Some(()))))
        });
        std::future::ready(Ok(Response::new(Box::pin(replies))))
    }
}

struct Bundles(Api);

impl ServerStreamingService<SubscribeToX509BundlesRequest> for Bundles {
    type Response = SubscribeToX509BundlesResponse;
    type ResponseStream = Replies<Self::Response>;
    type Future = ReplyFuture<Self::Response>;

    fn call(&mut self, _: Request<SubscribeToX509BundlesRequest>) -> Self::Future {
        let replies = unfold(
            (self.0.bundles.clone(), true),
            |(mut bundles, first)| async move {
                if !first {
                    bundles.changed().await.ok()?;
                }
                let all = bundles.borrow_and_update().clone();
                let all = all.into_iter().map(|(name, der)| (name, der.into()));
                let ca_certificates = all.collect();
                let response = SubscribeToX509BundlesResponse { ca_certificates };
                Some((Ok(response), (bundles, false)))
            },
        );
        std::future::ready(Ok(Response::new(Box::pin(replies))))
    }
}
