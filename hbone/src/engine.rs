//! The h2 + tokio-rustls engine: how tunnels are opened, driven and closed. No other module names `h2` or `http`.
//!
//! One task drives each tunnel and is the only one that reads and writes the tunnel's socket: [`lifetime`] for tunnels
//! that we dial, [`mod@serve`] for tunnels that we accept. One [`relay`] per stream moves bytes between that task and an
//! application's socket. All of them run on one thread.
//!
//! # Flow control: why a slow reader does not affect other streams
//!
//! - The connection's receive window is the stream window times the number of streams, so streams with stalled readers
//!   never use up the window of other streams.
//! - A relay takes arriving frames from h2 at once, whether or not the application reads, and holds them in a
//!   [`recv_buffer`], where small frames are merged. It releases the window only when the application has taken the
//!   bytes. So the window bounds the buffer, and a million one-byte frames cost a megabyte and not a million
//!   allocations. Also, h2 charges small frames that are not taken to one budget for the whole connection, and closes
//!   the connection when it is spent; taking frames at once refills that budget before a slow reader can spend it.

mod accept;
mod byte_stream;
mod dial;
mod failure;
mod h2_config;
mod head;
mod keepalive;
mod lifetime;
mod recv_buffer;
mod relay;
mod serve;
mod stream;
mod transport;
mod tunnel;

pub(crate) use dial::Dial;
pub use dial::SocketFactory;
pub(crate) use lifetime::Driver;
pub use serve::serve;
pub use stream::Stream;
pub(crate) use tunnel::Tunnel;
