//! Clients and servers that attack an HBONE port.
//!
//! Real programs (curl, openssl) cover the attacks that they can make. For the rest there is [`Tunnel`], which connects
//! with any certificate and sends any HTTP/2 frames, valid or not, and [`RogueServer`], which listens where a pod should
//! be. [`Neighbour`] is a well-behaved client that an attack must not affect. [`DaemonMonitor`] measures what the daemon
//! logs and uses meanwhile.

mod certs;
mod fixture;
mod frames;
mod monitor;
mod neighbour;
mod netns;
mod rogue_server;
mod tls;
mod tunnel;

pub use certs::{Leaf, TestCa};
pub use fixture::{
    AttackFixture, MEMBER_IDENTITY, NON_READING_PORT, STREAM_WINDOW_BYTES, WRITING_PORT,
};
pub use frames::{Frame, FrameType, connect, frame, headers, literal, rst_stream, settings};
pub use monitor::DaemonMonitor;
pub use neighbour::Neighbour;
pub(crate) use netns::block_on_in_netns;
pub use netns::{Netns, run_in_netns};
pub use rogue_server::{Behaviour, RogueServer, empty_settings, response_headers};
pub use tls::{ALPN_H2, TLS13_ONLY, TlsClient};
pub use tunnel::{ConnectResult, PREFACE, Tunnel};
