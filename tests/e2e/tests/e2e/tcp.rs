//! TCP semantics pass through the mesh exactly: the same bytes, the same ends, in the same order.
//!
//! Each connection below is made on every path (direct, meshed over IPv4 and IPv6, with only the
//! client and with only the server in the mesh), and both ends must see the same on all of them.

mod ends;
mod pressure;
mod resets;
mod silence;
