//! From objects to the model: pure functions, no I/O, no clock.
//!
//! There are two steps. Each object is first read by itself ([`extract`]): that yields facts and
//! faults that depend on nothing else, which is why a source can use the same step to decide
//! whether a new version of an object may replace the last good one. Then the facts are put
//! together: who owns which address, which pods stand behind which service.

mod addresses;
mod endpoints;
mod external;
mod extract;
mod join;
mod policies;

use rustc_hash::FxHashMap;

use crate::diagnostic::Diagnostic;
use crate::id::ObjectRef;
use crate::model::Model;
use crate::objects::{Object, Objects, Origin};
use crate::params::Params;

/// Makes the model of these objects and says what is wrong with them. The diagnostics are sorted, and
/// hold those that were found while reading ([`Objects::report`]).
pub fn compile(objects: &Objects, params: &Params) -> (Model, Vec<Diagnostic>) {
    let mut diagnostics: Vec<Diagnostic> = objects.diagnostics().collect();
    let facts = extract::all(objects, params, &mut diagnostics);
    let (model, cross) = join::join(facts);
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

/// Something read from an object, with where it was written.
#[derive(Clone, Debug)]
struct Fact<T> {
    value: T,
    reference: ObjectRef,
    origin: Origin,
}

impl<T> Fact<T> {
    fn diagnostic(
        &self,
        field: impl Into<String>,
        code: &'static str,
        message: String,
    ) -> Diagnostic {
        Diagnostic::new(field, code, message).at(self.reference.clone(), &self.origin)
    }
}

/// A hash map that is quick for short keys.
type Map<K, V> = FxHashMap<K, V>;

#[cfg(test)]
mod tests;
