//! Which files of the folder changed since the last scan, and which objects are in use.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustc_hash::FxHashMap;

use crate::diagnostic::{Diagnostic, Origin};
use crate::id::ObjectRef;
use crate::objects::{Object, Objects, Parsed, parse};
use crate::params::Params;

use super::file::{File, FileState, NEVER_READ};
use super::last_good::{Previous, is_good, merge, reuse};
use super::listing::{Listing, list};

/// Two scans this far apart must find the same changes before they count. Between a writer's
/// truncation and its last write, or between the two halves of a move, the folder is in an
/// unintended state.
pub(super) const STABLE_FOR: Duration = Duration::from_millis(20);

/// The result of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScanResult {
    Unchanged,
    /// Changes that must be confirmed by another scan, [`STABLE_FOR`] from now.
    Unsettled,
    /// Objects or diagnostics may have changed.
    Changed,
}

/// Whether changes must be confirmed by another scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Debounce {
    Required,
    /// The changes count at once.
    Skipped,
}

/// The files of the folder as they were last read.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    files: BTreeMap<Arc<str>, File>,
    /// Why the last listing of the folder failed.
    pub(super) failure: Option<io::Error>,
    is_scanned: bool,
    /// The unconfirmed changes of the last scan, and when they were first found.
    unsettled: Option<(Changes, SystemTime)>,
}

/// The files that changed, with their new state.
type Changes = BTreeMap<Arc<str>, FileState>;

impl Files {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            files: BTreeMap::new(),
            failure: None,
            is_scanned: false,
            unsettled: None,
        }
    }

    /// Finds changed files, and takes the changes over once they are confirmed.
    pub(super) fn scan(
        &mut self,
        params: &Params,
        now: SystemTime,
        debounce: Debounce,
    ) -> ScanResult {
        let listing = match self.list() {
            Ok(listing) => listing,
            Err(error) => {
                let is_first = self.failure.is_none();
                self.failure = Some(error);
                self.unsettled = None;
                return result(is_first);
            }
        };
        let (changes, contents) = self.changes(&listing, now);
        if debounce == Debounce::Required && !self.is_settled(&changes, now) {
            return ScanResult::Unsettled;
        }
        self.unsettled = None;
        let changed = self.failure.take().is_some() | !self.is_scanned | !changes.is_empty();
        self.is_scanned = true;
        self.apply(changes, contents, params);
        result(changed)
    }

    /// The error of a file that has never been read, so that its content is unknown.
    pub(super) fn never_read(&self) -> Option<&Diagnostic> {
        let never = self.files.values().filter(|file| file.hash == NEVER_READ);
        never.filter_map(|file| file.error.as_ref()).next()
    }

    /// The changed files, and the new contents.
    fn changes(
        &mut self,
        listing: &Listing,
        now: SystemTime,
    ) -> (Changes, BTreeMap<Arc<str>, Vec<u8>>) {
        let (mut changes, mut contents) = (Changes::new(), BTreeMap::new());
        for (name, path) in &listing.files {
            let file = self.files.entry(name.clone()).or_default();
            let state = match file.changed_bytes(path, now) {
                Ok(Some((bytes, hash))) => {
                    contents.insert(name.clone(), bytes);
                    Some(FileState::Content(hash))
                }
                Ok(None) if file.error.is_some() => Some(FileState::Readable),
                Ok(None) => None,
                Err(error) => file.unreadable(error.to_string()),
            };
            changes.extend(state.map(|state| (name.clone(), state)));
        }
        for (name, error) in listing.unknown_files() {
            let file = self.files.entry(name.clone()).or_default();
            let state = file.unreadable(error.to_string());
            changes.extend(state.map(|state| (name.clone(), state)));
        }
        for (name, file) in &mut self.files {
            if listing.files.contains_key(name) || listing.unknown.contains_key(name) {
                continue;
            }
            let state = match listing.unknown_above(name) {
                Some(error) => file.unreadable(error.to_string()),
                None => Some(FileState::Deleted),
            };
            changes.extend(state.map(|state| (name.clone(), state)));
        }
        (changes, contents)
    }

    /// Whether an earlier scan found the same changes, at least [`STABLE_FOR`] ago.
    fn is_settled(&mut self, changes: &Changes, now: SystemTime) -> bool {
        if changes.is_empty() {
            return true;
        }
        match &self.unsettled {
            Some((found, since)) if found == changes && *since <= now => now
                .duration_since(*since)
                .is_ok_and(|passed| passed >= STABLE_FOR),
            _ => {
                self.unsettled = Some((changes.clone(), now));
                false
            }
        }
    }

    /// Takes confirmed changes over: parses new contents and merges them with the last good objects.
    fn apply(
        &mut self,
        changes: Changes,
        mut contents: BTreeMap<Arc<str>, Vec<u8>>,
        params: &Params,
    ) {
        let mut parsed = Vec::new();
        let (mut deleted, mut new) = (BTreeSet::new(), BTreeSet::new());
        for (name, state) in changes {
            let file = self.files.entry(name.clone()).or_default();
            file.error = None;
            match state {
                FileState::Deleted => drop(deleted.insert(name)),
                FileState::Readable => {}
                FileState::Unreadable(reason) => {
                    let message = format!("{reason}; its last content stays in use");
                    file.error = Some(file_diagnostic(&name, "file_unreadable", message));
                }
                FileState::Content(hash) => {
                    if std::mem::replace(&mut file.hash, hash) == NEVER_READ {
                        new.insert(name.clone());
                    }
                    let bytes = contents.remove(&name).unwrap_or_default();
                    let mut content = parse(&name, &bytes);
                    reuse(&mut content, &file.documents);
                    parsed.push((name, content));
                }
            }
        }
        let objects = self.previous_objects(&parsed, params);
        for (name, content) in parsed {
            let file = self.files.entry(name.clone()).or_default();
            let reported = std::mem::take(&mut file.documents).diagnostics;
            let previous = PreviousObjects {
                file: &name,
                reported: &reported,
                is_new: new.contains(&name),
                deleted: &deleted,
                objects: &objects,
            };
            file.documents = merge(content, &previous, params);
        }
        self.files.retain(|name, _| !deleted.contains(name));
    }

    /// All objects in use, and the diagnostics of the reader.
    pub(super) fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        for file in self.files.values() {
            for (object, origin) in &file.documents.objects {
                objects.insert(object.clone(), origin.clone());
            }
            let diagnostics = file.documents.diagnostics.iter().chain(&file.error);
            diagnostics.for_each(|diagnostic| objects.report(diagnostic.clone()));
        }
        if let Some(error) = &self.failure {
            let message = format!("{error}; the last state stays in use");
            objects.report(file_diagnostic(&"".into(), "folder_unreadable", message));
        }
        objects
    }

    /// Lists the folder, twice if a file seems to be deleted: a listing that runs while a file is
    /// renamed may show neither name.
    fn list(&self) -> io::Result<Listing> {
        let listing = list(&self.dir)?;
        match self
            .files
            .keys()
            .all(|file| listing.files.contains_key(file))
        {
            true => Ok(listing),
            false => list(&self.dir),
        }
    }

    /// All objects in use, by reference. Empty unless a parsed file has an error: only then are
    /// previous versions needed, and then those of all files, because an object may have moved from
    /// one file to another.
    fn previous_objects(&self, parsed: &[(Arc<str>, Parsed)], params: &Params) -> ByReference {
        let mut objects = ByReference::default();
        if parsed.iter().all(|(_, parsed)| is_good(parsed, params)) {
            return objects;
        }
        for (name, file) in &self.files {
            for object in &file.documents.objects {
                let files = objects.entry(object.0.reference()).or_default();
                files.push((name.clone(), object.clone()));
            }
        }
        objects
    }
}

fn result(changed: bool) -> ScanResult {
    match changed {
        true => ScanResult::Changed,
        false => ScanResult::Unchanged,
    }
}

fn file_diagnostic(file: &Arc<str>, code: &'static str, message: String) -> Diagnostic {
    let origin = Origin {
        file: file.clone(),
        document: 0,
    };
    Diagnostic::new("", code, message).at(None, &origin)
}

/// Objects by reference, with the files that hold them.
type ByReference = FxHashMap<ObjectRef, Vec<(Arc<str>, (Object, Origin))>>;

/// The objects before one file was read again.
struct PreviousObjects<'a> {
    file: &'a Arc<str>,
    /// The previous diagnostics of the file.
    reported: &'a [Diagnostic],
    /// The file did not exist before.
    is_new: bool,
    /// Files deleted by the same changes: this file may be one of them under a new name.
    deleted: &'a BTreeSet<Arc<str>>,
    objects: &'a ByReference,
}

impl Previous for PreviousObjects<'_> {
    fn version(&self, object: &ObjectRef) -> Option<&(Object, Origin)> {
        let known = self.objects.get(object)?;
        let own = known.iter().find(|(file, _)| file == self.file);
        own.or(known.first()).map(|(_, object)| object)
    }

    fn was_ignored(&self, object: &ObjectRef) -> bool {
        let is_ignored = |d: &&Diagnostic| matches!(d.code, "unknown_kind" | "unsupported_kind");
        let mut ignored = self.reported.iter().filter(is_ignored);
        ignored.any(|diagnostic| diagnostic.object.as_ref() == Some(object))
    }

    /// Of a deleted file always the policies, and everything else only if this file is new: an error
    /// elsewhere must not keep a pod whose file was deleted.
    fn of_file(&self) -> Vec<(Object, Origin)> {
        let is_of_file = |(file, (object, _)): &&(Arc<str>, (Object, Origin))| {
            let may_have_moved = self.is_new || matches!(object, Object::Policy(_));
            file == self.file || (may_have_moved && self.deleted.contains(file))
        };
        let all = self.objects.values().flatten().filter(is_of_file);
        all.map(|(_, (object, origin))| {
            let origin = Origin {
                file: self.file.clone(),
                document: origin.document,
            };
            (object.clone(), origin)
        })
        .collect()
    }
}
