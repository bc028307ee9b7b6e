//! The messages, client and server generated from `mesh/proto/istio_ca.proto`.
#![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]

tonic::include_proto!("istio.v1.auth");
