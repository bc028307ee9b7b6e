//! Deserializes values into Kubernetes types, with errors that name the field.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::diagnostic::Diagnostic;

/// Deserializes a value.
///
/// # Errors
///
/// A field has another type; the diagnostic has its path.
pub(crate) fn deserialize<T: DeserializeOwned>(value: Value) -> Result<T, Box<Diagnostic>> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        // serde_path_to_error writes "." for the whole value.
        let field = if path == "." { String::new() } else { path };
        let message = error.into_inner().to_string();
        Box::new(Diagnostic::new(field, "bad_field", message))
    })
}
