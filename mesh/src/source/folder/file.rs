//! Whether the content of one file changed since it was last read.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use xxhash_rust::xxh3::xxh3_64;

use crate::diagnostic::Diagnostic;

use super::RESCAN;
use super::last_good::Documents;

/// The state of a changed file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FileState {
    Deleted,
    /// New content, by its hash.
    Content(u64),
    /// Why it cannot be read.
    Unreadable(String),
    /// Readable again, with the content of before.
    Readable,
}

/// Larger files are refused. A pod is a few kilobytes; this is thousands of them in one file.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// A file that was written within this time before it was read is read again: time stamps are too
/// coarse to show another write since.
const TIMESTAMP_GRANULARITY: Duration = Duration::from_secs(1);
/// An emptied file is most likely about to be written. It counts as empty when a periodic scan still
/// finds it empty.
const EMPTY_FILE_GRACE: Duration = RESCAN.saturating_sub(Duration::from_millis(500));
/// The hash of a file that has never been read.
pub(super) const NEVER_READ: u64 = 0;

/// A file as it was last read.
#[derive(Debug, Default)]
pub(super) struct File {
    stamp: Option<Stamp>,
    pub(super) hash: u64,
    /// When the file was first found empty after it had content.
    empty_since: Option<SystemTime>,
    pub(super) documents: Documents,
    /// Why the file cannot be read now.
    pub(super) error: Option<Diagnostic>,
}

/// The metadata that changes with the content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    changed: (i64, i64),
    length: u64,
    inode: u64,
}

impl File {
    /// The state of a file that cannot be read, if the reason is new.
    pub(super) fn unreadable(&self, reason: String) -> Option<FileState> {
        let known = self.error.as_ref();
        let is_known = known.is_some_and(|known| known.message.starts_with(&*reason));
        (!is_known).then_some(FileState::Unreadable(reason))
    }

    /// The content and its hash, if it differs from the last content that was taken over.
    pub(super) fn changed_bytes(
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
        if meta.len() > MAX_FILE_BYTES {
            let limit = MAX_FILE_BYTES >> 20;
            return Err(io::Error::other(format!("larger than {limit} MiB")));
        }
        let mut bytes = Vec::new();
        file.by_ref().take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
        if self.is_being_written(&bytes, now) {
            return Ok(None);
        }
        let hash = hash(&bytes);
        if self.hash != hash {
            self.stamp = None;
            return Ok(Some((bytes, hash)));
        }
        let is_old = meta.modified().is_ok_and(|at| {
            now.duration_since(at)
                .is_ok_and(|age| age > TIMESTAMP_GRANULARITY)
        });
        self.stamp = is_old.then_some(stamp);
        Ok(None)
    }

    /// The file held objects and has been empty for less than [`EMPTY_FILE_GRACE`].
    fn is_being_written(&mut self, bytes: &[u8], now: SystemTime) -> bool {
        if !bytes.is_empty() || self.documents.objects.is_empty() {
            self.empty_since = None;
            return false;
        }
        let since = *self.empty_since.get_or_insert(now);
        now.duration_since(since)
            .is_ok_and(|waited| waited < EMPTY_FILE_GRACE)
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

/// The hash of a content; never [`NEVER_READ`].
fn hash(bytes: &[u8]) -> u64 {
    xxh3_64(bytes) | 1
}
