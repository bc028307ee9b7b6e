//! What survives a restart: which authority signs, which roots are distributed, and the latest expiry
//! of all certificates issued.
//!
//! The folder has one file with the state, replaced atomically, and a copy of each authority in use.
//! An operator who replaces the files in the authority's folder therefore does not remove the old
//! authority before its successor signs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh::certs::Authority;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use super::folder::{self, FolderError, to_pem};
use super::rotation::{PublishedRoot, RootRotation};

const STATE_FILE: &str = "state.json";
/// All published roots, for programs that distribute them.
const BUNDLE_FILE: &str = "root-bundle.pem";
/// Prefix of the folders with copies of authorities; a number follows.
const COPY_PREFIX: &str = "authority-";

/// The folder with the state.
#[derive(Debug)]
pub(super) struct StateDir {
    path: PathBuf,
    copies: Vec<AuthorityCopy>,
    /// Number of the latest copy.
    last_copy: u64,
}

#[derive(Debug)]
struct AuthorityCopy {
    /// Name of its folder.
    name: String,
    authority: Arc<Authority>,
}

/// The content of [`STATE_FILE`]. Times are in seconds since 1970.
#[derive(Debug, Serialize, Deserialize)]
struct StateFile {
    /// Folder of the copy of the signing authority.
    signing: String,
    #[serde(rename = "last_end")]
    latest_expiry: u64,
    roots: Vec<RootEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RootEntry {
    pem: String,
    #[serde(rename = "known_at")]
    propagated_at: u64,
    #[serde(rename = "until")]
    withdraw_at: Option<u64>,
}

impl StateDir {
    /// Opens or creates the folder, and reads the state if there is one.
    pub(super) fn open(path: &Path) -> Result<(Self, Option<RootRotation>), FolderError> {
        folder::create_private_dir(path).map_err(|source| FolderError::State {
            path: path.to_owned(),
            source,
        })?;
        let mut state_dir = Self {
            path: path.to_owned(),
            copies: Vec::new(),
            last_copy: 0,
        };
        let rotation = state_dir.read()?;
        Ok((state_dir, rotation))
    }

    /// Whether the folder has any part of a state, even if the state file is missing.
    pub(super) fn has_content(&self) -> bool {
        self.copy_dirs().next().is_some() || self.path.join(STATE_FILE).exists()
    }

    /// Copies the authority's files and opens the copy, so that later changes to the files do not
    /// affect the authority that signs.
    pub(super) fn copy_authority(&mut self, from: &Path) -> Result<Arc<Authority>, FolderError> {
        self.last_copy += 1;
        let name = format!("{COPY_PREFIX}{}", self.last_copy);
        let copy = self.path.join(&name);
        let _ = fs::remove_dir_all(&copy);
        folder::copy(from, &copy)?;
        let authority = Arc::new(folder::open(&copy)?);
        self.copies.push(AuthorityCopy {
            name,
            authority: authority.clone(),
        });
        Ok(authority)
    }

    /// Writes the state, and removes copies of authorities that are no longer in use.
    pub(super) fn write(
        &mut self,
        rotation: &RootRotation,
        latest_expiry: SystemTime,
    ) -> Result<(), FolderError> {
        let state = StateFile {
            signing: self.copy_name(rotation.signing()).to_owned(),
            latest_expiry: unix_seconds(latest_expiry),
            roots: rotation.roots().iter().map(RootEntry::new).collect(),
        };
        let bundle: String = state.roots.iter().map(|root| root.pem.as_str()).collect();
        let json = serde_json::to_vec_pretty(&state).unwrap_or_default();
        for (name, content) in [
            (STATE_FILE, json.as_slice()),
            (BUNDLE_FILE, bundle.as_bytes()),
        ] {
            let path = self.path.join(name);
            folder::replace_private(&path, content)
                .map_err(|source| FolderError::State { path, source })?;
        }
        self.remove_unused_copies(rotation);
        Ok(())
    }

    fn read(&mut self) -> Result<Option<RootRotation>, FolderError> {
        let path = self.path.join(STATE_FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(FolderError::State { path, source }),
        };
        let invalid = |message: String| FolderError::InvalidState {
            path: path.clone(),
            message,
        };
        let state: StateFile =
            serde_json::from_slice(&text).map_err(|error| invalid(error.to_string()))?;
        let number = state.signing.strip_prefix(COPY_PREFIX);
        self.last_copy = number
            .and_then(|number| number.parse().ok())
            .ok_or_else(|| invalid("it names no copy of an authority".to_owned()))?;
        let roots = state.roots.iter().map(RootEntry::parse);
        let roots = roots
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| invalid("a root in it is not a certificate".to_owned()))?;
        let signing = Arc::new(folder::open(&self.path.join(&state.signing))?);
        self.copies.push(AuthorityCopy {
            name: state.signing,
            authority: signing.clone(),
        });
        let latest_expiry = from_unix_seconds(state.latest_expiry);
        Ok(Some(RootRotation::restore(signing, roots, latest_expiry)))
    }

    /// The folders with copies of authorities, in use or not.
    fn copy_dirs(&self) -> impl Iterator<Item = fs::DirEntry> + use<> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries.filter(|entry| {
            let name = entry.file_name();
            name.to_string_lossy().starts_with(COPY_PREFIX)
        })
    }

    fn copy_name(&self, authority: &Arc<Authority>) -> &str {
        let copy = self.copies.iter().find(|copy| copy.authority == *authority);
        copy.map_or("", |copy| &copy.name)
    }

    /// Errors are ignored: a copy that stays is as well protected as one in use.
    fn remove_unused_copies(&mut self, rotation: &RootRotation) {
        self.copies.retain(|copy| {
            [rotation.signing(), rotation.latest_authority()].contains(&&copy.authority)
        });
        for entry in self.copy_dirs() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if self.copies.iter().all(|copy| copy.name != name) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

impl RootEntry {
    fn new(published: &PublishedRoot) -> Self {
        Self {
            pem: to_pem(&published.root),
            propagated_at: unix_seconds(published.propagated_at),
            withdraw_at: published.withdraw_at.map(unix_seconds),
        }
    }

    fn parse(&self) -> Option<PublishedRoot> {
        Some(PublishedRoot {
            root: CertificateDer::from_pem_slice(self.pem.as_bytes()).ok()?,
            propagated_at: from_unix_seconds(self.propagated_at),
            withdraw_at: self.withdraw_at.map(from_unix_seconds),
        })
    }
}

/// Rounded up, so that no persisted time is earlier than the actual one.
fn unix_seconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    let since = since.unwrap_or_default();
    since.as_secs() + u64::from(since.subsec_nanos() > 0)
}

fn from_unix_seconds(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}
