//! The model of the cluster: state and pure functions, without input or output.

pub(crate) mod cluster;
pub(crate) mod endpoints;
pub(crate) mod hosts;
pub(crate) mod ipam;
pub(crate) mod kube_proxy;
pub(crate) mod manifest;
pub(crate) mod pod;
pub(crate) mod render;
pub(crate) mod schedule;
pub(crate) mod service;
pub(crate) mod topology;

/// Namespace and name.
pub(crate) type Key = (String, String);
