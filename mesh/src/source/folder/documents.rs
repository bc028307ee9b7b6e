//! What one file holds, when new versions of its objects may be broken.
//!
//! A version that cannot be read, or that has a fault, does not replace a good one. That is how a
//! slip of the hand in a file never takes a pod out of the mesh.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::Params;
use crate::compile::faults;
use crate::diagnostic::{Diagnostic, ObjectRef};
use crate::objects::{Object, Origin, Parsed, PolicyKind};

/// The objects of one file, and what is wrong with their newest versions.
#[derive(Debug, Default)]
pub(super) struct Documents {
    pub(super) objects: Vec<(Object, Origin)>,
    pub(super) diagnostics: Vec<Diagnostic>,
}

/// Finds an object in the state before the file was read again: in the same file, else in any.
pub(super) trait Before {
    fn last(&self, object: &ObjectRef) -> Option<&(Object, Origin)>;
    /// All of the same file, and of those that it may have been until now.
    fn of_file(&self) -> Vec<(Object, Origin)>;
    /// The same file had this object already, and nothing was made of it.
    fn was_ignored(&self, object: &ObjectRef) -> bool;
}

/// Nothing of it needs an earlier version.
pub(super) fn is_good(parsed: &Parsed, params: &Params) -> bool {
    parsed.broken.is_empty()
        && parsed.ignored.is_empty()
        && parsed
            .objects
            .iter()
            .all(|(o, _)| faults(o, params).is_empty())
}

/// Takes the old object for every policy that says the same. What it means is kept with it, so that
/// one edit in a file of thousands of policies does not have all of them worked out, and compared,
/// again.
pub(super) fn reuse(parsed: &mut Parsed, before: &Documents) {
    if !parsed.objects.iter().any(|(object, _)| is_policy(object)) {
        return;
    }
    let known: FxHashMap<ObjectRef, &Object> = before
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

/// Merges what was parsed with what was there before.
pub(super) fn merge(parsed: Parsed, before: &impl Before, params: &Params) -> Documents {
    let Parsed {
        objects,
        broken,
        unreadable,
        ignored,
    } = parsed;
    let mut merged = Documents::default();
    for (object, origin) in objects {
        let new = (object, origin);
        let kept = last_good(&new, before, params);
        if let Some(kept) = kept {
            let reference = new.0.reference();
            let faults = faults(&new.0, params).into_iter();
            let diagnostics = faults.map(|fault| still(fault.at(reference.clone(), &new.1)));
            merged.diagnostics.extend(diagnostics);
            merged.objects.push((kept, new.1));
        } else {
            merged.objects.push(new);
        }
    }
    keep_ignored(ignored, before, &mut merged);
    let read = merged.objects.len();
    keep_broken(&broken, &unreadable, before, &mut merged);
    deny_unreadable(unreadable, read, &mut merged);
    merged.diagnostics.extend(broken);
    merged
}

/// Keeps the policies of the file in whose place there is something new now that the mesh does not
/// read: more likely its kind is a slip of the hand than that another object took over the name.
fn keep_ignored(ignored: Vec<Diagnostic>, before: &impl Before, merged: &mut Documents) {
    if ignored.is_empty() {
        return;
    }
    let present = references(&merged.objects);
    let mut missing: FxHashMap<(Arc<str>, Arc<str>), Object> = before
        .of_file()
        .into_iter()
        .map(|(object, _)| (object.reference(), object))
        .filter(|(reference, object)| is_policy(object) && !present.contains(reference))
        .map(|(reference, object)| ((reference.namespace, reference.name), object))
        .collect();
    for mut diagnostic in ignored {
        let new = diagnostic.object.as_ref();
        let new = new.filter(|object| !before.was_ignored(object));
        let namesake = |new: &ObjectRef| (new.namespace.clone(), new.name.clone());
        if let Some(kept) = new.map(namesake).and_then(|name| missing.remove(&name)) {
            let (file, document) = (diagnostic.file.clone(), diagnostic.document);
            diagnostic.object = Some(kept.reference());
            diagnostic.code = "bad_kind";
            diagnostic = still(diagnostic);
            merged.objects.push((kept, Origin { file, document }));
        }
        merged.diagnostics.push(diagnostic);
    }
}

/// Adds what stands for policies that cannot be read, unless an earlier version was kept that may
/// be one of it: those from `kept` on. An earlier version of the same name is it for certain; of
/// the others each can be one more, so there have to be as many.
fn deny_unreadable(unreadable: Vec<(Object, Origin)>, kept: usize, merged: &mut Documents) {
    let mut go_on: Vec<ObjectRef> = merged.objects[kept..]
        .iter()
        .filter(|(object, _)| !is_stand_in(object))
        .map(|(object, _)| object.reference())
        .collect();
    let present = references(&merged.objects);
    let mut missing = Vec::new();
    for (object, origin) in unreadable {
        let reference = object.reference();
        go_on.retain(|kept| *kept != reference);
        if !present.contains(&reference) {
            missing.push((object, origin));
        }
    }
    for kind in POLICIES {
        let of_kind = |(object, _): &(Object, Origin)| object.kind() == kind;
        let wanted = missing.iter().filter(|entry| of_kind(entry)).count();
        let there = go_on.iter().filter(|kept| *kept.kind == *kind).count();
        if there >= wanted {
            missing.retain(|entry| !of_kind(entry));
        }
    }
    merged.objects.extend(missing);
}

const POLICIES: [&str; 3] = [
    PolicyKind::Authorization.as_str(),
    PolicyKind::PeerAuthentication.as_str(),
    PolicyKind::Network.as_str(),
];

fn is_policy(object: &Object) -> bool {
    matches!(object, Object::Policy(_))
}

fn is_stand_in(object: &Object) -> bool {
    matches!(object, Object::Policy(policy) if policy.is_stand_in())
}

fn references(objects: &[(Object, Origin)]) -> BTreeSet<ObjectRef> {
    objects
        .iter()
        .map(|(object, _)| object.reference())
        .collect()
}

/// The last good version of an object whose new one has a fault. A pod of another uid is not
/// another version of the same pod.
fn last_good(new: &(Object, Origin), before: &impl Before, params: &Params) -> Option<Object> {
    if faults(&new.0, params).is_empty() {
        return None;
    }
    let (last, _) = before.last(&new.0.reference())?;
    let uid = |object: &Object| object.metadata().uid.clone();
    let same = uid(last) == uid(&new.0);
    (same && faults(last, params).is_empty()).then(|| last.clone())
}

/// Keeps the objects whose new version could not even be read. A document that does not say which
/// object it is may be any of the file's that are missing now. What stood for a document goes on
/// only while the same document is broken and says even less.
fn keep_broken(
    broken: &[Diagnostic],
    unreadable: &[(Object, Origin)],
    before: &impl Before,
    merged: &mut Documents,
) {
    let mut keep: Vec<(Object, Origin)> = Vec::new();
    for diagnostic in broken {
        let last = diagnostic
            .object
            .as_ref()
            .and_then(|object| before.last(object));
        keep.extend(last.map(|(object, _)| {
            let (file, document) = (diagnostic.file.clone(), diagnostic.document);
            (object.clone(), Origin { file, document })
        }));
    }
    if broken.iter().any(|diagnostic| diagnostic.object.is_none()) {
        let is_silent = |document: usize| {
            broken
                .iter()
                .any(|diagnostic| diagnostic.document == document)
                && unreadable.iter().all(|(_, at)| at.document != document)
        };
        let file = before.of_file().into_iter();
        keep.extend(file.filter(|(o, at)| !is_stand_in(o) || is_silent(at.document)));
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

fn still(mut diagnostic: Diagnostic) -> Diagnostic {
    diagnostic
        .message
        .push_str(" (the last good version stays in use)");
    diagnostic
}
