//! The whole authority, over real TLS on loopback.

mod bench;
mod bounds;
mod issued;
mod many;
mod refused;
mod replaced;
mod secrets;
