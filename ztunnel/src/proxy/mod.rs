//! What happens to one connection: where it goes, whether it may, and how its end is told.
//!
//! - [`outbound`]: what the pod opens, redirected to 15001;
//! - [`inbound`]: what reaches the pod through the mesh, on 15008;
//! - [`inbound_plain`]: what reaches the pod in clear, redirected to 15006.
//!
//! Each takes the same steps: **register** the connection, so that whoever ends connections finds
//! it; decide (this is where authorization stands, between the registration and the first dial);
//! **serve** it; and account for it once, however it ends ([`flow`]).

mod address;
mod error;
mod flow;
pub(crate) mod inbound;
pub(crate) mod inbound_plain;
pub(crate) mod outbound;

pub(crate) use error::Error;
