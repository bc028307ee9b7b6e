//! What must survive a restart while roots are replaced: who signs, which roots are handed out, and
//! until when certificates of before are about.
//!
//! One file that is replaced as a whole, and beside it a folder with a copy of the authority that
//! signs: an operator who puts a new one into the authority's folder does not take the old one away
//! before its time.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh::certs::Authority;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use super::folder::{self, FolderError};
use super::rotation::{PublishedRoot, Rotation};

const FILE: &str = "state.json";
/// For whoever distributes the roots: all that are handed out now.
const BUNDLE: &str = "root-bundle.pem";
const COPY: &str = "authority-";

/// The folder of the state.
#[derive(Debug)]
pub(super) struct State {
    dir: PathBuf,
    /// Name of the copy of the authority that signs, and the authority it is of.
    copies: Vec<(String, Arc<Authority>)>,
    count: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    /// The folder of the authority that signs.
    signing: String,
    /// Seconds since 1970.
    last_end: u64,
    roots: Vec<WrittenRoot>,
}

#[derive(Debug, Serialize, Deserialize)]
struct WrittenRoot {
    pem: String,
    known_at: u64,
    until: Option<u64>,
}

impl State {
    /// The folder, and what was left in it.
    pub(super) fn open(dir: &Path) -> Result<(Self, Option<Rotation>), FolderError> {
        folder::private_dir(dir).map_err(|source| FolderError::State {
            path: dir.to_owned(),
            source,
        })?;
        let mut state = Self {
            dir: dir.to_owned(),
            copies: Vec::new(),
            count: 0,
        };
        let left = state.read()?;
        Ok((state, left))
    }

    /// Whether there has been an authority, whatever else is left of the state.
    pub(super) fn remembers(&self) -> bool {
        self.entries().next().is_some() || self.dir.join(FILE).exists()
    }

    /// Copies of authorities, in use or not.
    fn entries(&self) -> impl Iterator<Item = fs::DirEntry> + use<> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(COPY))
    }

    fn read(&mut self) -> Result<Option<Rotation>, FolderError> {
        let path = self.dir.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(FolderError::State { path, source }),
        };
        let garbled = |message: String| FolderError::Garbled {
            path: path.clone(),
            message,
        };
        let written: Written =
            serde_json::from_slice(&text).map_err(|error| garbled(error.to_string()))?;
        let number = written.signing.strip_prefix(COPY);
        self.count = number
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| garbled("it names no copy of an authority".to_owned()))?;
        let roots = written.roots.iter().map(WrittenRoot::read);
        let roots = roots
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| garbled("a root in it is no certificate".to_owned()))?;
        let signing = Arc::new(folder::open(&self.dir.join(&written.signing))?);
        self.copies.push((written.signing, signing.clone()));
        Ok(Some(Rotation::restored(
            signing,
            roots,
            at(written.last_end),
        )))
    }

    /// Copies the authority's files, and reads it from the copy: what is written down is what will
    /// sign, whatever happens to the files meanwhile.
    pub(super) fn keep(&mut self, from: &Path) -> Result<Arc<Authority>, FolderError> {
        self.count += 1;
        let name = format!("{COPY}{}", self.count);
        let copy = self.dir.join(&name);
        let _ = fs::remove_dir_all(&copy);
        folder::copy(from, &copy)?;
        let authority = Arc::new(folder::open(&copy)?);
        self.copies.push((name, authority.clone()));
        Ok(authority)
    }

    /// Writes everything down, and removes copies that nobody needs any more.
    pub(super) fn write(
        &mut self,
        rotation: &Rotation,
        last_end: SystemTime,
    ) -> Result<(), FolderError> {
        let signing = self.name_of(rotation.signing()).unwrap_or_default();
        let written = Written {
            signing: signing.to_owned(),
            last_end: seconds(last_end),
            roots: rotation.roots().iter().map(WrittenRoot::new).collect(),
        };
        let bundle: String = written.roots.iter().map(|root| root.pem.as_str()).collect();
        let text = serde_json::to_vec_pretty(&written).unwrap_or_default();
        for (name, content) in [(FILE, text.as_slice()), (BUNDLE, bundle.as_bytes())] {
            let path = self.dir.join(name);
            folder::replace_private(&path, content)
                .map_err(|source| FolderError::State { path, source })?;
        }
        self.forget(rotation);
        Ok(())
    }

    fn name_of(&self, authority: &Arc<Authority>) -> Option<&str> {
        let copy = self.copies.iter().find(|(_, copy)| copy == authority);
        copy.map(|(name, _)| name.as_str())
    }

    /// Best effort: a copy that stays is as safe as those that are needed.
    fn forget(&mut self, rotation: &Rotation) {
        let next = rotation.next().map(|(next, _)| next);
        self.copies
            .retain(|(_, copy)| copy == rotation.signing() || Some(copy) == next);
        for entry in self.entries() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if self.copies.iter().all(|(copy, _)| *copy != name) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

impl WrittenRoot {
    fn new(published: &PublishedRoot) -> Self {
        Self {
            pem: super::keeper::pem(&published.root),
            known_at: seconds(published.known_at),
            until: published.until.map(seconds),
        }
    }

    fn read(&self) -> Option<PublishedRoot> {
        Some(PublishedRoot {
            root: CertificateDer::from_pem_slice(self.pem.as_bytes()).ok()?,
            known_at: at(self.known_at),
            until: self.until.map(at),
        })
    }
}

/// Rounded up: what is remembered never ends before what was.
fn seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    since.as_secs() + u64::from(since.subsec_nanos() > 0)
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}
