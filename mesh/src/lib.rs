//! What the mesh knows and what it decides.
//!
//! Kubernetes objects come in through a [source], are turned into a [`Model`] by the pure function
//! [`compile`], and reach the data path through the [`Store`], which is read without a lock:
//!
//! ```text
//! folder of manifests -> objects (typed) -> compile (pure) -> Model -> Store -> route(), lookups
//! ```
//!
//! Three rules hold everywhere in this crate.
//!
//! * **The data path never sees Kubernetes types.** It reads [`Workload`], [`Service`] and
//!   [`Node`], which hold only what has been checked.
//! * **Invalid input never widens access.** An object that cannot be understood is reported as a
//!   [`Diagnostic`] with its file, object and field, and keeps its last good version. An address
//!   that two pods claim belongs to neither: it is refused, not guessed.
//! * **The same objects give the same model**, whatever files they are in and in whatever order
//!   they are read.
//!
//! [`Model::authorize`] answers the one question of the inbound path: may this connection reach this
//! workload? [`policy`] says how. [`route()`] answers the one question of the outbound path: where does a connection from this
//! workload to this address go, and is it carried by the mesh? [`certs`] issues and renews the
//! certificates by which workloads prove who they are.
#![forbid(unsafe_code)]

mod authorize;
pub mod certs;
mod compile;
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
