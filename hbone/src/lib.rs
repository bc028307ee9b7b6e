//! The tunnel of an ambient mesh: HBONE, HTTP/2 CONNECT inside mutual TLS 1.3 between SPIFFE identities.
//!
//! One side of a tunnel speaks for a pod that connects ("downstream"), the other for the pod that is connected to
//! ("upstream"). Each application connection becomes one CONNECT stream; many streams share a tunnel. This crate owns
//! both sockets, all buffers and the pool of tunnels. Its callers decide (which peer, which identities, whether a
//! request is allowed, what to dial) and never touch a byte:
//!
//! - outbound: [`Pool::open`] chooses or dials a tunnel and sends the CONNECT; [`Stream::relay`] moves bytes until both
//!   sides have closed, and says how it ended;
//! - inbound: [`serve`] accepts TLS and HTTP/2 on a transport, asks the caller's [`TunnelService`] about each request, and
//!   relays to the [`Accepted::upstream`] socket that the caller has dialled;
//! - plain: [`relay_tcp`] moves bytes between two TCP sockets with the same semantics.
//!
//! TCP semantics pass through exactly: FIN is END_STREAM, a reset is RST_STREAM, one direction may stay open for ever
//! after the other has closed, a reader that stalls stops its writer and nobody else, and silence is not an error.
//! Every wait has a deadline with a [`Reason`], every queue a bound, every task an owner.
//!
//! Everything here runs inside a `tokio::task::LocalSet` on a current-thread runtime: a connection never leaves its
//! thread, and futures are not `Send`. What is shared between threads ([`ClientTls`], [`ServerTls`], [`StopToken`],
//! [`Counters`]) is `Send + Sync`.
//!
//! The crate knows no Kubernetes, no mesh and no configuration file. The HTTP/2 engine is one private module; no type
//! of `h2`, `http` or `bytes` is part of the interface, so that another engine can take its place.
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        reason = "a test that fails says so by panic"
    )
)]

mod connect;
mod engine;
mod error;
mod pool;
mod reason;
mod relay;
mod server;
mod stop_token;
mod tls;

pub use connect::{
    Authority, Baggage, ConnectRequest, ConnectResponse, Forwarded, HeaderError, TraceParent,
};
pub use engine::{Stream, serve};
pub use error::Error;
pub use pool::{Pool, PoolConfig, PoolKey, SocketFactory};
pub use reason::{Fault, Reason};
pub use relay::{Counters, RelayOpts, RelayOutcome, RelaySummary, Side, relay_tcp};
pub use server::{
    Accepted, Peer, Rejected, ServeConfig, ServeOutcome, ServeSummary, TunnelService,
};
pub use stop_token::StopToken;
pub use tls::{
    AeadBackend, ClientTls, Credentials, CrlError, Revocations, ServerTls, SvidError, TlsError,
    aead_backend,
};
