//! The files of a folder: which of them changed, and what they hold.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustc_hash::FxHashMap;

use crate::Params;
use crate::diagnostic::{Diagnostic, ObjectRef};
use crate::objects::{Object, Objects, Origin, Parsed, parse};

use super::RESCAN;
use super::documents::{Before, Documents, is_good, merge, reuse};
use super::listing::{Listing, list};

/// Larger files are refused. A pod is a few kilobytes; this is thousands of them in one file.
const MAX_FILE: u64 = 64 << 20;
/// A file that was written within this time before it was read is read again: time stamps are too
/// coarse to tell whether it was written once more since.
const SETTLE: Duration = Duration::from_secs(1);
/// Two looks that are this far apart have to see the same before it counts: between a writer's
/// truncation and its last write, or the two halves of a move, a folder is in no state that anybody
/// meant.
pub(super) const AGREE: Duration = Duration::from_millis(20);
/// A file that was emptied is most likely about to be written, by somebody who thinks. It counts
/// as empty when it still is at the next look that nobody asked for.
const EMPTIED: Duration = RESCAN.saturating_sub(Duration::from_millis(500));

/// What a look at the folder found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Nothing new.
    Same,
    /// Something that has to be seen once more, [`AGREE`] from now.
    Unsettled,
    /// The objects or diagnostics may be others now.
    Changed,
}

/// Whether a look may wait for the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// It may.
    Some,
    /// What is seen counts.
    None,
}

/// The files as they were last read.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    files: BTreeMap<Arc<str>, File>,
    /// Why the folder could not be listed the last time.
    pub(super) failure: Option<io::Error>,
    scanned: bool,
    /// What the last look saw that was new, and when it was seen first.
    unsettled: Option<(News, SystemTime)>,
}

/// What is another than it was, by file.
type News = BTreeMap<Arc<str>, Seen>;

/// A file as a look sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Gone,
    /// By its hash.
    Content(u64),
    /// Why it cannot be read.
    Unreadable(String),
    /// It can be read again, and is as it was.
    Readable,
}

#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    hash: u64,
    /// When it was first seen empty although it held something.
    empty_since: Option<SystemTime>,
    documents: Documents,
    unreadable: Option<Diagnostic>,
}

/// Tells whether a file is as it was. `None` in its place never equals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    changed: (i64, i64),
    length: u64,
    inode: u64,
}

impl Files {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            files: BTreeMap::new(),
            failure: None,
            scanned: false,
            unsettled: None,
        }
    }

    /// Looks what changed, and takes it if it has been seen before.
    pub(super) fn scan(&mut self, params: &Params, now: SystemTime, patience: Patience) -> Look {
        let listing = match self.list() {
            Ok(listing) => listing,
            Err(error) => {
                let news = self.failure.is_none();
                self.failure = Some(error);
                self.unsettled = None;
                return if news { Look::Changed } else { Look::Same };
            }
        };
        let (news, contents) = self.news(&listing, now);
        if patience == Patience::Some && !self.is_settled(&news, now) {
            return Look::Unsettled;
        }
        self.unsettled = None;
        let changed = self.failure.take().is_some() | !self.scanned | !news.is_empty();
        self.scanned = true;
        self.take(news, contents, params);
        if changed { Look::Changed } else { Look::Same }
    }

    /// A file that could not be read yet, not once, and why: what it holds is not known.
    pub(super) fn never_read(&self) -> Option<&Diagnostic> {
        let never = self.files.values().filter(|file| file.hash == NEVER);
        never.filter_map(|file| file.unreadable.as_ref()).next()
    }

    /// What is another than it was, with the new contents.
    fn news(&mut self, listing: &Listing, now: SystemTime) -> (News, BTreeMap<Arc<str>, Vec<u8>>) {
        let (mut news, mut contents) = (News::new(), BTreeMap::new());
        for (name, path) in &listing.files {
            let file = self.files.entry(name.clone()).or_default();
            let seen = match file.changed_bytes(path, now) {
                Ok(Some((bytes, hash))) => {
                    contents.insert(name.clone(), bytes);
                    Some(Seen::Content(hash))
                }
                Ok(None) if file.unreadable.is_some() => Some(Seen::Readable),
                Ok(None) => None,
                Err(error) => file.unreadable(error.to_string()),
            };
            news.extend(seen.map(|seen| (name.clone(), seen)));
        }
        for (name, error) in listing.unknown_files() {
            let file = self.files.entry(name.clone()).or_default();
            let seen = file.unreadable(error.to_string());
            news.extend(seen.map(|seen| (name.clone(), seen)));
        }
        for (name, file) in &mut self.files {
            if listing.files.contains_key(name) || listing.unknown.contains_key(name) {
                continue;
            }
            let seen = match listing.unknown_above(name) {
                Some(error) => file.unreadable(error.to_string()),
                None => Some(Seen::Gone),
            };
            news.extend(seen.map(|seen| (name.clone(), seen)));
        }
        (news, contents)
    }

    /// Whether the last look saw the same.
    fn is_settled(&mut self, news: &News, now: SystemTime) -> bool {
        if news.is_empty() {
            return true;
        }
        match &self.unsettled {
            Some((seen, since)) if seen == news && *since <= now => now
                .duration_since(*since)
                .is_ok_and(|passed| passed >= AGREE),
            _ => {
                self.unsettled = Some((news.clone(), now));
                false
            }
        }
    }

    /// What was seen counts from now on.
    fn take(&mut self, news: News, mut contents: BTreeMap<Arc<str>, Vec<u8>>, params: &Params) {
        let mut parsed = Vec::new();
        let (mut gone, mut new) = (BTreeSet::new(), BTreeSet::new());
        for (name, seen) in news {
            let file = self.files.entry(name.clone()).or_default();
            file.unreadable = None;
            match seen {
                Seen::Gone => drop(gone.insert(name)),
                Seen::Readable => {}
                Seen::Unreadable(reason) => {
                    let message = format!("{reason}; what it held stays in use");
                    file.unreadable = Some(file_diagnostic(&name, "file_unreadable", message));
                }
                Seen::Content(hash) => {
                    if std::mem::replace(&mut file.hash, hash) == NEVER {
                        new.insert(name.clone());
                    }
                    let bytes = contents.remove(&name).unwrap_or_default();
                    let mut found = parse(&name, &bytes);
                    reuse(&mut found, &file.documents);
                    parsed.push((name, found));
                }
            }
        }
        let before = self.before(&parsed, params);
        for (name, found) in parsed {
            let reported =
                std::mem::take(&mut self.files.entry(name.clone()).or_default().documents);
            let before = LastGood {
                file: &name,
                reported: &reported.diagnostics,
                is_new: new.contains(&name),
                gone: &gone,
                all: &before,
            };
            let documents = merge(found, &before, params);
            self.files.entry(name).or_default().documents = documents;
        }
        self.files.retain(|name, _| !gone.contains(name));
    }

    /// All objects, and the diagnostics that were found while reading.
    pub(super) fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        for file in self.files.values() {
            for (object, origin) in &file.documents.objects {
                objects.insert(object.clone(), origin.clone());
            }
            let diagnostics = file.documents.diagnostics.iter().chain(&file.unreadable);
            diagnostics.for_each(|diagnostic| objects.report(diagnostic.clone()));
        }
        if let Some(error) = &self.failure {
            let message = format!("{error}; the last state stays in use");
            objects.report(file_diagnostic(&"".into(), "folder_unreadable", message));
        }
        objects
    }

    /// Lists twice if a file seems to be gone: a listing that runs while a file is renamed may
    /// show neither name.
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

    /// All objects as they were, by name. Only wanted when something new is broken, and then of all
    /// files, because an object may have moved from one to another.
    fn before(&self, parsed: &[(Arc<str>, Parsed)], params: &Params) -> Last {
        if parsed.iter().all(|(_, parsed)| is_good(parsed, params)) {
            return Last::default();
        }
        let mut last = Last::default();
        for (name, file) in &self.files {
            for object in &file.documents.objects {
                let files = last.entry(object.0.reference()).or_default();
                files.push((name.clone(), object.clone()));
            }
        }
        last
    }
}

/// Objects by name, with the files that hold them.
type Last = FxHashMap<ObjectRef, Vec<(Arc<str>, (Object, Origin))>>;

impl File {
    /// That it cannot be read, if this is news.
    fn unreadable(&self, reason: String) -> Option<Seen> {
        let known = self.unreadable.as_ref();
        let is_known = known.is_some_and(|known| known.message.starts_with(&*reason));
        (!is_known).then_some(Seen::Unreadable(reason))
    }

    /// The content, with its hash, if it is not what was taken the last time.
    fn changed_bytes(
        &mut self,
        path: &Path,
        now: SystemTime,
    ) -> io::Result<Option<(Vec<u8>, u64)>> {
        let mut file = fs::File::open(path)?;
        let meta = file.metadata()?;
        let stamp = Stamp::of(&meta);
        if self.stamp == Some(stamp) {
            return Ok(None);
        }
        if meta.len() > MAX_FILE {
            return Err(io::Error::other(format!(
                "larger than {} MiB",
                MAX_FILE >> 20
            )));
        }
        let mut bytes = Vec::new();
        file.by_ref().take(MAX_FILE).read_to_end(&mut bytes)?;
        if self.is_being_written(&bytes, now) {
            return Ok(None);
        }
        let hash = hash(&bytes);
        if self.hash != hash {
            self.stamp = None;
            return Ok(Some((bytes, hash)));
        }
        let settled = meta
            .modified()
            .is_ok_and(|at| now.duration_since(at).is_ok_and(|d| d > SETTLE));
        self.stamp = settled.then_some(stamp);
        Ok(None)
    }

    /// A file that held objects and is empty now.
    fn is_being_written(&mut self, bytes: &[u8], now: SystemTime) -> bool {
        if !bytes.is_empty() || self.documents.objects.is_empty() {
            self.empty_since = None;
            return false;
        }
        let since = *self.empty_since.get_or_insert(now);
        now.duration_since(since)
            .is_ok_and(|waited| waited < EMPTIED)
    }
}

impl Stamp {
    fn of(meta: &fs::Metadata) -> Self {
        Self {
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            length: meta.len(),
            inode: meta.ino(),
        }
    }
}

fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish() | 1
}

/// The hash of what has never been read.
const NEVER: u64 = 0;

fn file_diagnostic(file: &Arc<str>, code: &'static str, message: String) -> Diagnostic {
    let (file, field) = (file.clone(), String::new());
    Diagnostic {
        file,
        document: 0,
        object: None,
        field,
        code,
        message,
    }
}

struct LastGood<'a> {
    file: &'a Arc<str>,
    /// What was said of it before.
    reported: &'a [Diagnostic],
    /// It was not there before.
    is_new: bool,
    /// Files that vanish as this one changes: it may be one of them, under another name.
    gone: &'a BTreeSet<Arc<str>>,
    all: &'a Last,
}

impl Before for LastGood<'_> {
    fn last(&self, object: &ObjectRef) -> Option<&(Object, Origin)> {
        let known = self.all.get(object)?;
        let own = known.iter().find(|(file, _)| file == self.file);
        own.or(known.first()).map(|(_, object)| object)
    }

    fn was_ignored(&self, object: &ObjectRef) -> bool {
        let ignored = |p: &&Diagnostic| matches!(p.code, "unknown_kind" | "unsupported_kind");
        let mut objects = self.reported.iter().filter(ignored);
        objects.any(|diagnostic| diagnostic.object.as_ref() == Some(object))
    }

    /// Of a file that vanished the policies always, all else only if this file is new: a pod whose
    /// file was deleted must not live on for a mistake elsewhere.
    fn of_file(&self) -> Vec<(Object, Origin)> {
        let is_of = |(file, (object, _)): &&(Arc<str>, (Object, Origin))| {
            let may_move = self.is_new || matches!(object, Object::Policy(_));
            file == self.file || (may_move && self.gone.contains(file))
        };
        let all = self.all.values().flatten().filter(is_of);
        all.map(|(file, (object, origin))| match file == self.file {
            true => (object.clone(), origin.clone()),
            false => {
                let file = self.file.clone();
                (
                    object.clone(),
                    Origin {
                        file,
                        ..origin.clone()
                    },
                )
            }
        })
        .collect()
    }
}
