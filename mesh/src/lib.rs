//! The model of the mesh, and the decisions on it.
//!
//! A [source] reads Kubernetes objects, the pure function [`compile`] turns them into a [`Model`],
//! and the data path loads the model from the [`Store`] without a lock:
//!
//! ```text
//! folder of manifests -> objects (typed) -> compile (pure) -> Model -> Store -> route(), authorize()
//! ```
//!
//! Three rules hold everywhere in this crate.
//!
//! * **The data path never sees Kubernetes types.** It reads [`Workload`], [`Service`] and [`Node`],
//!   which hold only validated data.
//! * **Invalid input never widens access.** An invalid object is reported as a [`Diagnostic`] with its
//!   file, object and field, and its last good version stays in use. An address that two pods claim
//!   has no owner: it is refused.
//! * **The same objects give the same model**, whatever files they are in and in whatever order they
//!   are read.
//!
//! [`Model::authorize`] makes the inbound decision: may this connection reach this workload?
//! [`policy`] explains how. [`route()`] makes the outbound decision: which endpoint does a connection
//! use, and does the mesh carry it? [`certs`] issues and renews the certificates of workloads.
#![forbid(unsafe_code)]

mod authorize;
pub mod certs;
mod compile;
mod deserialize;
mod diagnostic;
mod id;
mod model;
mod names;
pub mod objects;
mod params;
pub mod policy;
mod route;
pub mod source;
mod store;
#[cfg(test)]
mod testing;

pub use authorize::InboundConnection;
pub use compile::compile;
pub use diagnostic::{Diagnostic, Origin, Severity};
pub use id::{NamedPort, ObjectRef, ServiceName, WorkloadUid};
pub use model::{
    AddressRefusal, Affinity, Distribution, Endpoint, EndpointKey, EndpointLease, EndpointPort,
    EndpointTarget, HBONE_PORT, Health, Load, Locality, Mode, Model, Namespace, Node, Service,
    ServicePort, Workload, WorkloadType,
};
pub use params::Params;
pub use policy::{Decision, Denial, PolicyReport, PolicySet, PolicyState};
pub use route::{Route, route};
pub use store::{Changes, Snapshot, Store};
