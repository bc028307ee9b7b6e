//! How is a connection to a CA opened: TCP, TLS with the current roots, HTTP/2?

use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::GaiResolver;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower_service::Service;

use super::address::Address;
use super::root_store::RootStore;

/// A CA that vanished without closing its connections is detected after the sum of these two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);
/// Limit for the headers of a response.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// The part of the connect timeout that is for TCP. The rest is for the TLS handshake.
const TCP_SHARE: f64 = 0.75;

/// A channel that connects with its first call, and again after its connection is lost.
pub(super) fn channel(
    address: &Address,
    server_name: ServerName<'static>,
    roots: Arc<RootStore>,
    connect_timeout: Duration,
) -> Result<Channel, tonic::transport::Error> {
    let origin = format!("https://{address}").parse();
    let origin: Uri = origin.unwrap_or_default();
    // The scheme of the endpoint is http, because the connector below adds TLS.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .origin(origin)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .http2_max_header_list_size(MAX_HEADER_BYTES);
    Ok(endpoint.connect_with_connector_lazy(TlsTransport {
        tcp: tcp_connector(GaiResolver::new(), connect_timeout.mul_f64(TCP_SHARE)),
        server_name,
        roots,
        connect_timeout,
    }))
}

/// Tries the addresses of a name one after the other, with an equal share of `limit` for each: an
/// address that does not respond leaves time for the others. If a name has IPv4 and IPv6 addresses,
/// the second family is tried in parallel after 300 ms (RFC 8305).
fn tcp_connector<R>(resolver: R, limit: Duration) -> HttpConnector<R> {
    let mut connector = HttpConnector::new_with_resolver(resolver);
    connector.set_connect_timeout(Some(limit));
    connector.set_nodelay(true);
    connector
}

/// Opens a TCP connection, and TLS on it.
#[derive(Clone)]
struct TlsTransport {
    tcp: HttpConnector,
    server_name: ServerName<'static>,
    roots: Arc<RootStore>,
    connect_timeout: Duration,
}

type Connected = TokioIo<TlsStream<TcpStream>>;
type BoxError = Box<dyn Error + Send + Sync>;

impl Service<Uri> for TlsTransport {
    type Response = Connected;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Connected, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let (tcp, this) = (self.tcp.call(uri), self.clone());
        let connect = async move {
            let tls = this.tls()?;
            let tcp = tcp.await?.into_inner();
            Ok(TokioIo::new(tls.connect(this.server_name, tcp).await?))
        };
        let limit = self.connect_timeout;
        Box::pin(async move {
            timeout(limit, connect).await.unwrap_or_else(|_| {
                let message = format!("no connection within {limit:?}");
                Err(io::Error::new(io::ErrorKind::TimedOut, message).into())
            })
        })
    }
}

impl TlsTransport {
    /// TLS with the current roots.
    fn tls(&self) -> io::Result<TlsConnector> {
        let mut roots = RootCertStore::empty();
        for root in self.roots.for_connection()?.roots() {
            roots.add(root.clone()).map_err(io::Error::other)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session skips verification, and the roots may have changed since it began.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}

#[cfg(test)]
mod tests {
    use std::future::{Ready, ready};
    use std::net::SocketAddr;
    use std::time::Instant;
    use std::vec;

    use hyper_util::client::legacy::connect::dns::Name;
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(1);

    /// Resolves every name to these addresses.
    #[derive(Clone)]
    struct Addresses(Vec<SocketAddr>);

    impl Service<Name> for Addresses {
        type Response = vec::IntoIter<SocketAddr>;
        type Error = io::Error;
        type Future = Ready<io::Result<vec::IntoIter<SocketAddr>>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Name) -> Self::Future {
            ready(Ok(self.0.clone().into_iter()))
        }
    }

    /// Connects, and returns the address or the kind of the error.
    async fn connect(addresses: &[SocketAddr]) -> Result<SocketAddr, io::ErrorKind> {
        let mut connector = tcp_connector(Addresses(addresses.to_vec()), TIMEOUT);
        // Without a port in the URI, the ports of the resolver are used.
        match connector.call(Uri::from_static("http://ca.example")).await {
            Ok(stream) => Ok(stream.into_inner().peer_addr().unwrap()),
            Err(error) => {
                let cause = error.source().and_then(|e| e.downcast_ref::<io::Error>());
                Err(cause.unwrap().kind())
            }
        }
    }

    /// A listener that does not respond to a SYN, because its accept queue is full.
    struct Unresponsive {
        address: SocketAddr,
        _listener: TcpListener,
        _queued: Vec<TcpStream>,
    }

    impl Unresponsive {
        async fn new() -> Self {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
            let listener = socket.listen(1).unwrap();
            let address = listener.local_addr().unwrap();
            let mut queued = Vec::new();
            let wait = Duration::from_millis(300);
            while let Ok(stream) = timeout(wait, TcpStream::connect(address)).await {
                queued.push(stream.unwrap());
            }
            Self {
                address,
                _listener: listener,
                _queued: queued,
            }
        }
    }

    #[tokio::test]
    async fn an_unresponsive_address_leaves_time_for_the_next() {
        let unresponsive = Unresponsive::new().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let start = Instant::now();
        assert_eq!(connect(&[unresponsive.address, good]).await, Ok(good));
        assert!(start.elapsed() >= TIMEOUT / 2, "{:?}", start.elapsed());
        let addresses = [unresponsive.address, unresponsive.address, good];
        assert_eq!(connect(&addresses).await, Ok(good));
    }

    #[tokio::test]
    async fn a_refused_address_does_not_end_the_attempt() {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let refused = closed.local_addr().unwrap();
        drop(closed);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        assert_eq!(connect(&[refused, good]).await, Ok(good));
        let kind = connect(&[refused]).await.unwrap_err();
        assert_eq!(kind, io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn five_unresponsive_addresses_take_one_timeout() {
        let unresponsive = Unresponsive::new().await;
        let start = Instant::now();
        let kind = connect(&[unresponsive.address; 5]).await.unwrap_err();
        assert_eq!(kind, io::ErrorKind::TimedOut);
        assert!(start.elapsed() < TIMEOUT * 2, "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn a_name_without_addresses_is_an_error() {
        connect(&[]).await.unwrap_err();
    }
}
