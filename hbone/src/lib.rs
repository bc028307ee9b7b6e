//! HBONE, the tunnel protocol of an ambient mesh: HTTP/2 CONNECT inside mutual TLS 1.3 between SPIFFE identities.
//!
//! A tunnel has two ends. The client end acts for the pod that connects (the downstream), the server end for the pod
//! that is connected to (the upstream). Each application connection is one CONNECT stream, and many streams share a
//! tunnel. This crate owns the sockets of tunnels and applications, all buffers and the pool of tunnels. Its callers
//! make the decisions (which peer, which identities, whether a request is allowed, what to dial) and do not move bytes:
//!
//! - outbound: [`Pool::open`] picks or dials a tunnel and sends the CONNECT; [`Stream::relay`] moves bytes until both
//!   directions have closed and returns a [`RelaySummary`];
//! - inbound: [`serve`] accepts TLS and HTTP/2 on a TCP connection, passes each request to the caller's
//!   [`TunnelService`], and relays to the [`Accepted::upstream`] socket that the caller has dialled;
//! - plain: [`relay_tcp`] moves bytes between two TCP sockets with the same semantics.
//!
//! TCP semantics are preserved: FIN becomes END_STREAM, RST becomes RST_STREAM, a connection may stay half-closed
//! without limit, a stalled reader stops its own writer and no other, and silence is not an error. Every wait has a
//! deadline with a [`Reason`], every queue a bound, every task an owner.
//!
//! All code runs inside a `tokio::task::LocalSet` on a current-thread runtime: a connection never leaves its thread,
//! and futures are not `Send`. Types that threads share ([`ClientTls`], [`ServerTls`], [`StopToken`], [`Counters`])
//! are `Send + Sync`.
//!
//! The crate does not depend on Kubernetes, the mesh model or configuration files. The HTTP/2 engine is one private
//! module, and no type of `h2`, `http` or `bytes` is part of the interface, so another engine can replace it.
//!
//! Where to look:
//!
//! | question | module |
//! |---|---|
//! | which limits and deadlines apply, and why | `config` |
//! | when a tunnel takes no more streams, and when it closes | `engine::lifetime` |
//! | which peer certificates are accepted | `tls::verify` |
//! | which tunnel a stream uses, and when another is dialled | `pool::choose_tunnel` |
//! | what reaches the other side when one side resets | `engine::relay`, `relay::tcp` |
//! | which failures are retryable | `reason` |
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        reason = "a panic is how a test fails"
    )
)]

mod config;
mod connect;
mod engine;
mod error;
mod pool;
mod reason;
mod relay;
mod server;
mod stop_token;
mod tls;

pub use config::{PoolConfig, ServeConfig};
pub use connect::{
    Authority, Baggage, ConnectRequest, ConnectResponse, Forwarded, HeaderError, TraceParent,
};
pub use engine::{SocketFactory, Stream, serve};
pub use error::Error;
pub use pool::{Pool, PoolKey};
pub use reason::{Fault, Reason};
pub use relay::{Counters, RelayOpts, RelayOutcome, RelaySummary, Side, relay_tcp};
pub use server::{Accepted, Peer, Rejected, ServeOutcome, ServeSummary, TunnelService};
pub use stop_token::StopToken;
pub use tls::{
    AeadBackend, ClientTls, Credentials, CrlError, Revocations, ServerTls, SvidError, TlsError,
    aead_backend,
};
