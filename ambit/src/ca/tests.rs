//! The whole authority, called over TLS on loopback.

mod fixture;
mod issued;
mod limits;
mod load;
mod refused;
mod rotation;
mod secrets;
