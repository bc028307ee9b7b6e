//! The connection to an authority: TCP, then TLS by the roots of the moment, then HTTP/2.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
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
use super::trust::Trust;

/// An authority that vanished without a word is noticed after these two.
const PING: Duration = Duration::from_secs(5);
const PONG: Duration = Duration::from_secs(4);
/// For an answer's head.
const HEAD_MOST: u32 = 16 * 1024;

/// A channel that connects with its first call, and anew when its connection is lost.
pub(super) fn channel(
    address: &Address,
    server_name: ServerName<'static>,
    trust: Arc<Trust>,
    limit: Duration,
) -> Result<Channel, tonic::transport::Error> {
    let origin = format!("https://{address}").parse();
    let origin: Uri = origin.unwrap_or_default();
    // TLS is the connector's; to the endpoint the transport looks like any other.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .origin(origin)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PONG)
        .http2_max_header_list_size(HEAD_MOST);
    Ok(endpoint.connect_with_connector_lazy(Connector {
        host: address.host().to_owned(),
        port: address.port(),
        server_name,
        trust,
        limit,
    }))
}

#[derive(Clone)]
struct Connector {
    host: String,
    port: u16,
    server_name: ServerName<'static>,
    trust: Arc<Trust>,
    limit: Duration,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let connected = timeout(this.limit, this.connect()).await;
            connected.map_err(|_| {
                let message = format!("no connection within {:?}", this.limit);
                io::Error::new(io::ErrorKind::TimedOut, message)
            })?
        })
    }
}

impl Connector {
    async fn connect(&self) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
        let tls = self.tls()?;
        let tcp = TcpStream::connect((self.host.as_str(), self.port)).await?;
        tcp.set_nodelay(true)?;
        let name = self.server_name.clone();
        Ok(TokioIo::new(tls.connect(name, tcp).await?))
    }

    fn tls(&self) -> io::Result<TlsConnector> {
        let mut roots = RootCertStore::empty();
        for root in self.trust.to_connect()?.roots() {
            roots.add(root.clone()).map_err(io::Error::other)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        // Its roots may have changed since the session began.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}
