//! Deserializes values into Kubernetes types, with diagnostics that name the field.

use mesh_kubernetes::FromJson;
use serde_json::Value;

use crate::diagnostic::Diagnostic;

/// Deserializes a value.
///
/// # Errors
///
/// A field has another type; the diagnostic has its path.
pub(crate) fn deserialize<T: FromJson>(value: Value) -> Result<T, Box<Diagnostic>> {
    T::from_json(value)
        .map_err(|error| Box::new(Diagnostic::new(error.field, "bad_field", error.message)))
}
