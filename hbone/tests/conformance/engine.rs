//! The interface under test, as a trait.

use std::rc::Rc;
use std::time::Duration;

use hbone::{
    ClientTls, ConnectRequest, ConnectResponse, Error, Pool, PoolConfig, PoolKey, RelayOpts,
    RelaySummary, ServeConfig, ServeSummary, ServerTls, SocketFactory, Stream, TunnelService,
};
use spiffe::SpiffeId;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The functions of the interface that scenarios use.
pub trait Engine: 'static {
    type Pool: 'static;
    type Stream: 'static;

    fn pool(config: PoolConfig, sockets: Rc<dyn SocketFactory>) -> Self::Pool;
    async fn open(
        pool: &Self::Pool,
        key: &PoolKey,
        expected: &[SpiffeId],
        tls: &ClientTls,
        request: ConnectRequest,
    ) -> Result<Self::Stream, Error>;
    fn retire_destination(pool: &Self::Pool, destination: &str);
    fn usable_tunnels(pool: &Self::Pool) -> usize;
    async fn close(pool: &Self::Pool, deadline: Instant);

    async fn response(stream: &mut Self::Stream) -> Result<ConnectResponse, Error>;
    async fn response_within(
        stream: &mut Self::Stream,
        limit: Duration,
    ) -> Result<ConnectResponse, Error>;
    fn peer(stream: &Self::Stream) -> SpiffeId;
    async fn relay(stream: Self::Stream, downstream: TcpStream, opts: RelayOpts) -> RelaySummary;
    fn into_io(stream: Self::Stream) -> Box<dyn Duplex>;

    async fn serve<S: TunnelService + 'static>(
        tcp: TcpStream,
        tls: &ServerTls,
        service: Rc<S>,
        config: &ServeConfig,
        drain: CancellationToken,
        abort: CancellationToken,
    ) -> ServeSummary;
}

pub trait Duplex: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

/// The h2 engine of this crate.
pub struct H2;

impl Engine for H2 {
    type Pool = Pool;
    type Stream = Stream;

    fn pool(config: PoolConfig, sockets: Rc<dyn SocketFactory>) -> Pool {
        Pool::new(config, sockets)
    }

    async fn open(
        pool: &Pool,
        key: &PoolKey,
        expected: &[SpiffeId],
        tls: &ClientTls,
        request: ConnectRequest,
    ) -> Result<Stream, Error> {
        pool.open(key, expected, tls, request).await
    }

    fn retire_destination(pool: &Pool, destination: &str) {
        pool.retire_destination(destination);
    }

    fn usable_tunnels(pool: &Pool) -> usize {
        pool.usable_tunnels()
    }

    async fn close(pool: &Pool, deadline: Instant) {
        pool.close(deadline).await;
    }

    async fn response(stream: &mut Stream) -> Result<ConnectResponse, Error> {
        stream.response().await
    }

    async fn response_within(
        stream: &mut Stream,
        limit: Duration,
    ) -> Result<ConnectResponse, Error> {
        stream.response_within(limit).await
    }

    fn peer(stream: &Stream) -> SpiffeId {
        stream.peer().clone()
    }

    async fn relay(stream: Stream, downstream: TcpStream, opts: RelayOpts) -> RelaySummary {
        stream.relay(downstream, opts).await
    }

    fn into_io(stream: Stream) -> Box<dyn Duplex> {
        Box::new(stream.into_io())
    }

    async fn serve<S: TunnelService + 'static>(
        tcp: TcpStream,
        tls: &ServerTls,
        service: Rc<S>,
        config: &ServeConfig,
        drain: CancellationToken,
        abort: CancellationToken,
    ) -> ServeSummary {
        hbone::serve(tcp, tls, service, config, drain, abort).await
    }
}
