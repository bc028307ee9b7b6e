//! Certificate authorities in tests: a fake one that sends invalid responses ([`FakeCa`]), and a client of the shipped
//! one ([`CaClient`]).

mod client;
mod fake;
mod response;

pub use client::{CaClient, CsrRequest, csr, sign_token, token_claims, unix_time, with_ca_client};
pub use fake::{CA_SERVER_NAME, FakeCa};
pub use response::CaResponse;
