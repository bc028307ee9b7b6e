//! The operator's side of the mesh.
//!
//! [`ca`] is the certificate authority: a service that speaks Istio's protocol and signs for what
//! its callers may speak for. The binary `ambit` is a command line around it.
#![forbid(unsafe_code)]

pub mod ca;
