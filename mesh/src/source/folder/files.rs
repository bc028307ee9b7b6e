//! The files of a folder: which of them changed, and what they hold.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustc_hash::FxHashMap;

use crate::Params;
use crate::objects::{Object, Objects, Origin, Parsed, parse};
use crate::problem::{ObjectRef, Problem};

use super::documents::{Before, Documents, is_good, merge, reuse};

/// Larger files are refused. A pod is a few kilobytes; this is thousands of them in one file.
const MAX_FILE: u64 = 64 << 20;
/// Folders within folders are followed this deep, which also ends a circle of links.
const MAX_DEPTH: usize = 16;
/// A file that was written within this time before it was read is read again: time stamps are too
/// coarse to tell whether it was written once more since.
const SETTLE: Duration = Duration::from_secs(1);

/// The files as they were last read.
#[derive(Debug)]
pub(super) struct Files {
    dir: PathBuf,
    files: BTreeMap<Arc<str>, File>,
    /// Why the folder could not be listed the last time.
    pub(super) failure: Option<io::Error>,
    scanned: bool,
}

#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    hash: u64,
    /// When it was first seen empty although it held something.
    empty_since: Option<SystemTime>,
    documents: Documents,
    unreadable: Option<Problem>,
}

/// Tells whether a file is as it was. `None` in its place never equals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    changed: (i64, i64),
    length: u64,
    inode: u64,
}

type Listing = BTreeMap<Arc<str>, PathBuf>;

impl Files {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            files: BTreeMap::new(),
            failure: None,
            scanned: false,
        }
    }

    /// Reads what changed; true if the objects or problems may be others now.
    pub(super) fn scan(&mut self, params: &Params, now: SystemTime) -> bool {
        let listing = match self.list() {
            Ok(listing) => listing,
            Err(error) => {
                let news = self.failure.is_none();
                self.failure = Some(error);
                return news;
            }
        };
        let mut changed = self.failure.take().is_some() | !self.scanned;
        self.scanned = true;
        let mut parsed = Vec::new();
        for (name, path) in &listing {
            let file = self.files.entry(name.clone()).or_default();
            changed |= file.read(name, path, now, &mut parsed);
        }
        for (name, new) in &mut parsed {
            if let Some(file) = self.files.get(name) {
                reuse(new, &file.documents);
            }
        }
        let before = self.before(&parsed, params);
        changed |= !parsed.is_empty();
        for (name, new) in parsed {
            let before = LastGood {
                file: &name,
                all: &before,
            };
            let documents = merge(new, &before, params);
            self.files.entry(name).or_default().documents = documents;
        }
        let files = self.files.len();
        self.files.retain(|name, _| listing.contains_key(name));
        changed | (self.files.len() < files)
    }

    /// All objects, and the problems that were found while reading.
    pub(super) fn objects(&self) -> Objects {
        let mut objects = Objects::default();
        for file in self.files.values() {
            for (object, origin) in &file.documents.objects {
                objects.insert(object.clone(), origin.clone());
            }
            let problems = file.documents.problems.iter().chain(&file.unreadable);
            problems.for_each(|problem| objects.report(problem.clone()));
        }
        if let Some(error) = &self.failure {
            let message = format!("{error}; the last state stays in use");
            objects.report(file_problem(&"".into(), "folder_unreadable", message));
        }
        objects
    }

    /// Lists twice if a file seems to be gone: a listing that runs while a file is renamed may
    /// show neither name.
    fn list(&self) -> io::Result<Listing> {
        let listing = list(&self.dir)?;
        match self.files.keys().all(|file| listing.contains_key(file)) {
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

fn list(dir: &Path) -> io::Result<Listing> {
    let mut listing = Listing::new();
    list_into(dir, "", 0, &mut listing)?;
    Ok(listing)
}

/// Takes `.yaml`, `.yml` and `.json`. Hidden names are left out: editors and Kubernetes' own
/// volumes keep unfinished things under them. Links are followed, as those volumes are made of them.
fn list_into(dir: &Path, prefix: &str, depth: usize, listing: &mut Listing) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else {
            continue;
        };
        // A file that is gone by now is simply not listed.
        let Ok(meta) = fs::metadata(&path) else {
            continue;
        };
        let relative = format!("{prefix}{name}");
        if meta.is_dir() && depth < MAX_DEPTH {
            match list_into(&path, &format!("{relative}/"), depth + 1, listing) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        } else if meta.is_file() && is_manifest(name) {
            listing.insert(relative.into(), path);
        }
    }
    Ok(())
}

fn is_manifest(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str());
    matches!(extension, Some("yaml" | "yml" | "json"))
}

impl File {
    /// Reads the file if it changed; true if a problem with reading it came or went.
    fn read(
        &mut self,
        name: &Arc<str>,
        path: &Path,
        now: SystemTime,
        parsed: &mut Vec<(Arc<str>, Parsed)>,
    ) -> bool {
        let unreadable = match self.changed_bytes(path, now) {
            Ok(bytes) => {
                parsed.extend(bytes.map(|bytes| (name.clone(), parse(name, &bytes))));
                None
            }
            Err(error) => {
                let message = format!("{error}; what it held stays in use");
                Some(file_problem(name, "file_unreadable", message))
            }
        };
        std::mem::replace(&mut self.unreadable, unreadable.clone()) != unreadable
    }

    /// The content if it is not what was read the last time.
    fn changed_bytes(&mut self, path: &Path, now: SystemTime) -> io::Result<Option<Vec<u8>>> {
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
        let settled = meta
            .modified()
            .is_ok_and(|at| now.duration_since(at).is_ok_and(|d| d > SETTLE));
        self.stamp = settled.then_some(stamp);
        let hash = hash(&bytes);
        let same = std::mem::replace(&mut self.hash, hash) == hash;
        Ok((!same).then_some(bytes))
    }

    /// A file that held objects and is empty now is most likely about to be written. It counts as
    /// empty only when it stays so.
    fn is_being_written(&mut self, bytes: &[u8], now: SystemTime) -> bool {
        if !bytes.is_empty() || self.documents.objects.is_empty() {
            self.empty_since = None;
            return false;
        }
        let since = *self.empty_since.get_or_insert(now);
        now.duration_since(since)
            .is_ok_and(|waited| waited < SETTLE)
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
    // Zero stands for "never read".
    hasher.finish() | 1
}

fn file_problem(file: &Arc<str>, code: &'static str, message: String) -> Problem {
    let (file, field) = (file.clone(), String::new());
    Problem {
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
    all: &'a Last,
}

impl Before for LastGood<'_> {
    fn last(&self, object: &ObjectRef) -> Option<&(Object, Origin)> {
        let known = self.all.get(object)?;
        let own = known.iter().find(|(file, _)| file == self.file);
        own.or(known.first()).map(|(_, object)| object)
    }

    fn of_file(&self) -> Vec<(Object, Origin)> {
        let all = self.all.values().flatten();
        all.filter(|(file, _)| file == self.file)
            .map(|(_, object)| object.clone())
            .collect()
    }
}
