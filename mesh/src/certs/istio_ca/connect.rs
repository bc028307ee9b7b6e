//! The connection to an authority: TCP, then TLS by the roots of the moment, then HTTP/2.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout};
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
        let addresses: Vec<_> = lookup_host((self.host.as_str(), self.port))
            .await?
            .collect();
        // A part is for TLS.
        let tcp = first(&addresses, self.limit.mul_f64(0.75), TcpStream::connect).await?;
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

/// The first address that answers, one after the other. Each has its share of the time that is left:
/// one that is dead does not take it from the others.
async fn first<T, F>(
    addresses: &[SocketAddr],
    limit: Duration,
    connect: impl Fn(SocketAddr) -> F,
) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let end = Instant::now() + limit;
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for (tried, address) in addresses.iter().enumerate() {
        let left = end.saturating_duration_since(Instant::now());
        let shares = u32::try_from(addresses.len() - tried).unwrap_or(u32::MAX);
        match timeout(left / shares, connect(*address)).await {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(error)) => failed = error,
            Err(_) => {
                let message = format!("{address} does not answer");
                failed = io::Error::new(io::ErrorKind::TimedOut, message);
            }
        }
    }
    Err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);

    fn addresses(count: u16) -> Vec<SocketAddr> {
        (1..=count)
            .map(|port| ([192, 0, 2, 1], port).into())
            .collect()
    }

    /// The first so many are dead; the others answer with their port.
    async fn answer(address: SocketAddr, dead: u16) -> io::Result<u16> {
        match address.port() <= dead {
            true => std::future::pending().await,
            false => Ok(address.port()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_address_leaves_time_for_the_next() {
        let began = Instant::now();
        let found = first(&addresses(2), LIMIT, |address| answer(address, 1)).await;
        assert_eq!((found.unwrap(), began.elapsed()), (2, LIMIT / 2));
        let found = first(&addresses(3), LIMIT, |address| answer(address, 2)).await;
        assert_eq!(found.unwrap(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn many_dead_addresses_take_no_longer_than_one() {
        let began = Instant::now();
        let failed = first(&addresses(5), LIMIT, |address| answer(address, 5)).await;
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() < LIMIT + Duration::from_millis(50));
        let failed = first(&[], LIMIT, |address| answer(address, 0)).await;
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
