//! What one file holds, when new versions of its objects may be broken.
//!
//! A version that cannot be read, or that has a fault, does not replace a good one. That is how a
//! slip of the hand in a file never takes a pod out of the mesh.

use std::collections::BTreeSet;

use crate::Params;
use crate::compile::faults;
use crate::objects::{Object, Origin, Parsed};
use crate::problem::{ObjectRef, Problem};

/// The objects of one file, and what is wrong with their newest versions.
#[derive(Debug, Default)]
pub(super) struct Documents {
    pub(super) objects: Vec<(Object, Origin)>,
    pub(super) problems: Vec<Problem>,
}

/// Finds an object in the state before the file was read again: in the same file, else in any.
pub(super) trait Before {
    fn last(&self, object: &ObjectRef) -> Option<&(Object, Origin)>;
    fn of_file(&self) -> Vec<(Object, Origin)>;
}

/// Nothing of it needs an earlier version.
pub(super) fn is_good(parsed: &Parsed, params: &Params) -> bool {
    parsed.broken.is_empty()
        && parsed
            .objects
            .iter()
            .all(|(o, _)| faults(o, params).is_empty())
}

/// Merges what was parsed with what was there before.
pub(super) fn merge(parsed: Parsed, before: &impl Before, params: &Params) -> Documents {
    let Parsed {
        objects,
        broken,
        ignored,
    } = parsed;
    let mut merged = Documents {
        objects: Vec::new(),
        problems: ignored,
    };
    for (object, origin) in objects {
        let new = (object, origin);
        let kept = last_good(&new, before, params);
        if let Some(kept) = kept {
            let reference = new.0.reference();
            let faults = faults(&new.0, params).into_iter();
            let problems = faults.map(|fault| still(fault.at(reference.clone(), &new.1)));
            merged.problems.extend(problems);
            merged.objects.push((kept, new.1));
        } else {
            merged.objects.push(new);
        }
    }
    keep_broken(&broken, before, &mut merged);
    merged.problems.extend(broken);
    merged
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
/// object it is may be any of the file's that are missing now.
fn keep_broken(broken: &[Problem], before: &impl Before, merged: &mut Documents) {
    let mut keep: Vec<(Object, Origin)> = Vec::new();
    for problem in broken {
        let last = problem
            .object
            .as_ref()
            .and_then(|object| before.last(object));
        keep.extend(last.map(|(object, _)| {
            let (file, document) = (problem.file.clone(), problem.document);
            (object.clone(), Origin { file, document })
        }));
    }
    if broken.iter().any(|problem| problem.object.is_none()) {
        keep.extend(before.of_file());
    }
    if keep.is_empty() {
        return;
    }
    let mut present: BTreeSet<ObjectRef> = merged
        .objects
        .iter()
        .map(|(object, _)| object.reference())
        .collect();
    let missing = keep
        .into_iter()
        .filter(|(object, _)| present.insert(object.reference()));
    merged.objects.extend(missing);
}

fn still(mut problem: Problem) -> Problem {
    problem
        .message
        .push_str(" (the last good version stays in use)");
    problem
}
