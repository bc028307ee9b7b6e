//! The mesh preserves TCP semantics: the same bytes and the same FIN or RST, in the same order.
//!
//! Each scenario runs on every path (direct, meshed over IPv4 and IPv6, with only the client and with only the server in
//! the mesh), and both ends must observe the same on all of them. Bulk transfers are in `serial::tcp_pressure`.

mod close;
mod idle;
mod resets;
