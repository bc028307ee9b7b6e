//! Compiles objects into the model: pure functions, no I/O, no clock.
//!
//! There are two steps. [`extract`] reads each object by itself. Its diagnostics depend on nothing
//! else, so the source uses the same step to decide whether a new version of an object may replace
//! the last good one. [`join`] combines the objects.
//!
//! | question | file |
//! |---|---|
//! | is a pod in the mesh? | `opt_in.rs` |
//! | who owns an address? | `addresses.rs` |
//! | which endpoints does a service have? | `endpoints.rs` |
//! | which services have an external address? | `external.rs` |
//! | which policies apply to a pod? | `policies.rs` |

mod addresses;
mod endpoints;
mod external;
mod extract;
mod join;
mod opt_in;
mod policies;

use rustc_hash::FxHashMap;

use crate::diagnostic::Diagnostic;
use crate::id::ObjectRef;
use crate::model::Model;
use crate::objects::{Object, Objects, Origin};
use crate::params::Params;

/// Compiles objects into a model. The diagnostics are sorted and include those of the reader
/// ([`Objects::report`]).
pub fn compile(objects: &Objects, params: &Params) -> (Model, Vec<Diagnostic>) {
    let mut diagnostics: Vec<Diagnostic> = objects.diagnostics().collect();
    let extracted = extract::all(objects, params, &mut diagnostics);
    let (model, cross) = join::join(extracted);
    diagnostics.extend(cross);
    diagnostics.sort();
    diagnostics.dedup();
    (model, diagnostics)
}

/// The errors of an object by itself, without any other object.
pub(crate) fn errors(object: &Object, params: &Params) -> Vec<Diagnostic> {
    let mut errors = extract::one(object, params);
    errors.retain(|diagnostic| !diagnostic.is_note());
    errors
}

/// What one object contains, with its reference and origin.
#[derive(Clone, Debug)]
struct Extracted<T> {
    value: T,
    reference: ObjectRef,
    origin: Origin,
}

impl<T> Extracted<T> {
    fn diagnostic(
        &self,
        field: impl Into<String>,
        code: &'static str,
        message: String,
    ) -> Diagnostic {
        Diagnostic::new(field, code, message).at(self.reference.clone(), &self.origin)
    }
}

/// A hash map that is fast for short keys.
type Map<K, V> = FxHashMap<K, V>;

#[cfg(test)]
mod tests;
