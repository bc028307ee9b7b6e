//! Which version of an object is in use: the new one of a file, or the last good one.
//!
//! A version that cannot be read, or that has an error, does not replace a good one. So a typing
//! error in a file never takes a pod out of the mesh and never removes a policy.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::compile::errors;
use crate::diagnostic::{Diagnostic, Origin};
use crate::id::ObjectRef;
use crate::objects::{Object, Parsed, PolicyKind};
use crate::params::Params;

/// The objects of one file that are in use, and what is wrong with their newest versions.
#[derive(Debug, Default)]
pub(super) struct Documents {
    pub(super) objects: Vec<(Object, Origin)>,
    pub(super) diagnostics: Vec<Diagnostic>,
}

/// The objects before the file was read again.
pub(super) trait Previous {
    /// The previous version of an object: from the same file, else from any.
    fn version(&self, object: &ObjectRef) -> Option<&(Object, Origin)>;
    /// All objects of the same file, and of deleted files that this one may be under a new name.
    fn of_file(&self) -> Vec<(Object, Origin)>;
    /// Whether the same file held this object already, and it was ignored.
    fn was_ignored(&self, object: &ObjectRef) -> bool;
}

/// Whether no object of the file needs a previous version.
pub(super) fn is_good(parsed: &Parsed, params: &Params) -> bool {
    let mut objects = parsed.objects.iter();
    parsed.errors.is_empty()
        && parsed.ignored.is_empty()
        && objects.all(|(object, _)| errors(object, params).is_empty())
}

/// Replaces every policy by its previous object if both are equal. The previous object caches the
/// parsed policy, so one edit in a file of thousands of policies does not parse and compare all of
/// them again.
pub(super) fn reuse(parsed: &mut Parsed, previous: &Documents) {
    if !parsed.objects.iter().any(|(object, _)| is_policy(object)) {
        return;
    }
    let known: FxHashMap<ObjectRef, &Object> = previous
        .objects
        .iter()
        .filter(|(object, _)| is_policy(object))
        .map(|(object, _)| (object.reference(), object))
        .collect();
    for (object, _) in &mut parsed.objects {
        if is_policy(object)
            && let Some(old) = known.get(&object.reference())
            && *old == object
        {
            *object = Object::clone(old);
        }
    }
}

/// Merges the new content of a file with the previous objects.
pub(super) fn merge(parsed: Parsed, previous: &impl Previous, params: &Params) -> Documents {
    let Parsed {
        objects,
        errors: unreadable,
        placeholders,
        ignored,
    } = parsed;
    let mut merged = Documents::default();
    for (object, origin) in objects {
        let new = (object, origin);
        let kept = last_good(&new, previous, params);
        if let Some(kept) = kept {
            let reference = new.0.reference();
            let errors = errors(&new.0, params).into_iter();
            let errors = errors.map(|error| rejected(error.at(reference.clone(), &new.1)));
            merged.diagnostics.extend(errors);
            merged.objects.push((kept, new.1));
        } else {
            merged.objects.push(new);
        }
    }
    keep_ignored(ignored, previous, &mut merged);
    let read = merged.objects.len();
    keep_unreadable(&unreadable, &placeholders, previous, &mut merged);
    add_placeholders(placeholders, read, &mut merged);
    merged.diagnostics.extend(unreadable);
    merged
}

/// Keeps each policy of the file whose document has now a kind that the mesh ignores: a typing error
/// in the kind is more likely than another object of the same name.
fn keep_ignored(ignored: Vec<Diagnostic>, previous: &impl Previous, merged: &mut Documents) {
    if ignored.is_empty() {
        return;
    }
    let present = references(&merged.objects);
    let mut missing: FxHashMap<(Arc<str>, Arc<str>), Object> = previous
        .of_file()
        .into_iter()
        .map(|(object, _)| (object.reference(), object))
        .filter(|(reference, object)| is_policy(object) && !present.contains(reference))
        .map(|(reference, object)| ((reference.namespace, reference.name), object))
        .collect();
    for mut diagnostic in ignored {
        let new = diagnostic.object.as_ref();
        let new = new.filter(|object| !previous.was_ignored(object));
        let key = |new: &ObjectRef| (new.namespace.clone(), new.name.clone());
        if let Some(kept) = new.map(key).and_then(|key| missing.remove(&key)) {
            diagnostic.object = Some(kept.reference());
            diagnostic.code = "bad_kind";
            diagnostic = rejected(diagnostic);
            merged.objects.push((kept, diagnostic.origin.clone()));
        }
        merged.diagnostics.push(diagnostic);
    }
}

/// Adds the placeholders of policies that cannot be read, unless a previous version was kept instead
/// (the objects from index `kept` on). A previous version of the same name replaces its placeholder;
/// the others replace the rest only if there are as many of them.
fn add_placeholders(placeholders: Vec<(Object, Origin)>, kept: usize, merged: &mut Documents) {
    let mut kept: Vec<ObjectRef> = merged.objects[kept..]
        .iter()
        .filter(|(object, _)| !is_placeholder(object))
        .map(|(object, _)| object.reference())
        .collect();
    let present = references(&merged.objects);
    let mut missing = Vec::new();
    for (object, origin) in placeholders {
        let reference = object.reference();
        kept.retain(|kept| *kept != reference);
        if !present.contains(&reference) {
            missing.push((object, origin));
        }
    }
    for kind in PolicyKind::ALL.map(PolicyKind::as_str) {
        let of_kind = |(object, _): &(Object, Origin)| object.kind() == kind;
        let needed = missing.iter().filter(|entry| of_kind(entry)).count();
        let available = kept.iter().filter(|kept| *kept.kind == *kind).count();
        if available >= needed {
            missing.retain(|entry| !of_kind(entry));
        }
    }
    merged.objects.extend(missing);
}

fn is_policy(object: &Object) -> bool {
    matches!(object, Object::Policy(_))
}

fn is_placeholder(object: &Object) -> bool {
    matches!(object, Object::Policy(policy) if policy.is_placeholder())
}

fn references(objects: &[(Object, Origin)]) -> BTreeSet<ObjectRef> {
    objects
        .iter()
        .map(|(object, _)| object.reference())
        .collect()
}

/// The last good version of an object whose new version has an error. A pod with another uid is
/// another pod, not another version.
fn last_good(new: &(Object, Origin), previous: &impl Previous, params: &Params) -> Option<Object> {
    if errors(&new.0, params).is_empty() {
        return None;
    }
    let (last, _) = previous.version(&new.0.reference())?;
    let uid = |object: &Object| object.metadata().uid.clone();
    let same = uid(last) == uid(&new.0);
    (same && errors(last, params).is_empty()).then(|| last.clone())
}

/// Keeps the objects whose new version cannot be read. A document without a readable reference may
/// be any object of the file that is missing now. A previous placeholder is kept only while its
/// document is still unreadable and has no new placeholder.
fn keep_unreadable(
    unreadable: &[Diagnostic],
    placeholders: &[(Object, Origin)],
    previous: &impl Previous,
    merged: &mut Documents,
) {
    let mut keep: Vec<(Object, Origin)> = Vec::new();
    for error in unreadable {
        let object = error.object.as_ref();
        let last = object.and_then(|object| previous.version(object));
        keep.extend(last.map(|(object, _)| (object.clone(), error.origin.clone())));
    }
    if unreadable.iter().any(|error| error.object.is_none()) {
        let has_no_placeholder = |document: usize| {
            unreadable.iter().any(|e| e.origin.document == document)
                && placeholders.iter().all(|(_, at)| at.document != document)
        };
        let file = previous.of_file().into_iter();
        keep.extend(file.filter(|(o, at)| !is_placeholder(o) || has_no_placeholder(at.document)));
    }
    if keep.is_empty() {
        return;
    }
    let mut present = references(&merged.objects);
    let missing = keep
        .into_iter()
        .filter(|(object, _)| present.insert(object.reference()));
    merged.objects.extend(missing);
}

/// Adds to an error that the version it is about is not in use.
fn rejected(mut diagnostic: Diagnostic) -> Diagnostic {
    diagnostic
        .message
        .push_str(" (the last good version stays in use)");
    diagnostic
}
