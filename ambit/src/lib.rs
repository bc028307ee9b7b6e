//! The operator's command line of the mesh, as a library.
//!
//! [`ca`] is the certificate authority: a service that speaks Istio's protocol and signs
//! certificates for the identities that its callers may impersonate. The binary `ambit` parses the
//! command line and calls it.
#![forbid(unsafe_code)]

pub mod ca;
