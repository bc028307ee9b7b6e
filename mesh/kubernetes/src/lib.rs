//! How a JSON value becomes a Kubernetes object, with an error that names the field.
//!
//! This is a crate of its own for the compiler: the deserializers of the object types are generic and large, and no
//! data path runs them. Optimised as part of `mesh` they take two thirds of its compile time (205 of 308 CPU seconds);
//! here they are compiled once, with little optimisation, for the mesh and the lab.
#![forbid(unsafe_code)]

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A value does not have the type of its field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// The path of the field, such as `spec.ports[0].port`. Empty for the whole value.
    pub field: String,
    /// What is wrong with it.
    pub message: String,
}

/// A Kubernetes type that can be read from JSON.
pub trait FromJson: Sized {
    /// Reads the object.
    ///
    /// # Errors
    ///
    /// The first field that has another type.
    fn from_json(value: Value) -> Result<Self, FieldError>;
}

/// A method that is not generic is compiled in this crate and not in the caller's.
macro_rules! from_json {
    ($($kind:ty),+) => {$(
        impl FromJson for $kind {
            fn from_json(value: Value) -> Result<Self, FieldError> {
                deserialize(value)
            }
        }
    )+};
}

from_json!(
    EndpointSlice,
    Namespace,
    Node,
    ObjectMeta,
    Pod,
    Service,
    ServiceAccount
);

fn deserialize<T: DeserializeOwned>(value: Value) -> Result<T, FieldError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        // serde_path_to_error writes "." for the whole value.
        let field = if path == "." { String::new() } else { path };
        let message = error.into_inner().to_string();
        FieldError { field, message }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn wrong_type_names_its_field() {
        let value = json!({"metadata": {"name": "a"}, "spec": {"ports": [{"port": "http"}]}});
        let error = Service::from_json(value).unwrap_err();
        assert_eq!(error.field, "spec.ports[0].port");
    }

    #[test]
    fn wrong_type_of_the_whole_value_has_no_field() {
        let error = Pod::from_json(json!([])).unwrap_err();
        assert_eq!(error.field, "");
    }
}
