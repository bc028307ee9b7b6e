//! A client that does to an HBONE port what no well-behaved peer does.
//!
//! Real programs (curl, openssl) cover what they can say; for the rest there is [`Tunnel`], which speaks TLS with
//! whatever certificate it is given and writes HTTP/2 frames by hand, right or wrong. [`Neighbour`] is the
//! well-behaved client that must not notice, [`Watch`] what the daemon says of it meanwhile.

mod arena;
mod certs;
mod frames;
mod impostor;
mod inside;
mod neighbour;
mod tls;
mod tunnel;
mod watch;

pub use arena::{Arena, MEMBER, STALL, TALK, WINDOW};
pub use certs::{Authority, Leaf};
pub use frames::{Frame, Kind, connect, frame, headers, literal, reset, settings};
pub use impostor::{Act, Impostor, no_settings, status};
pub(crate) use inside::inside_until;
pub use inside::{Origin, inside};
pub use neighbour::Neighbour;
pub use tls::{H2, Hello, TLS13};
pub use tunnel::{Answer, PREFACE, Tunnel};
pub use watch::Watch;
