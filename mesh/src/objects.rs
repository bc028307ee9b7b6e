//! Typed Kubernetes objects, each with the place it came from.

/// The objects of a source.
#[derive(Clone, Debug, Default)]
pub struct Objects;
