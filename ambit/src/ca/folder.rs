//! The authority's folder: found, made, and copied where a replacement cannot reach it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mesh::certs::{Authority, AuthorityError};
use zeroize::Zeroizing;

/// Istio's names. The key goes last: a folder that has it has all of it.
const FILES: [&str; 4] = [
    "root-cert.pem",
    "ca-cert.pem",
    "cert-chain.pem",
    "ca-key.pem",
];
/// None of the files is larger than a few kilobytes.
const FILE_MOST: u64 = 1 << 20;

/// Why the authority's folder, or the one of its state, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The authority in it is none.
    #[error("the certificate authority in {dir} cannot be used")]
    Authority {
        /// The folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: AuthorityError,
    },
    /// The folder is empty, and the state says that there was an authority.
    #[error(
        "there is no certificate authority in {dir}, and {state} remembers one: put its files back \
         (copies are in {state}), or put a new one there, or remove {state} to begin anew, with a \
         root that nobody has yet"
    )]
    Missing {
        /// The folder.
        dir: PathBuf,
        /// That of the state.
        state: PathBuf,
    },
    /// A file of the state cannot be read or written.
    #[error("cannot keep the state of the authority in {path}; give it a folder by --state-dir")]
    State {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The state is not understood. To go on without it would forget which roots are still needed.
    #[error("{path} is not a state of the authority: {message}; remove it to forget what it was")]
    Garbled {
        /// The file.
        path: PathBuf,
        /// For the operator.
        message: String,
    },
}

/// The authority in the folder; a new one, with a root of its own, if there is nothing of one.
pub(super) fn open_or_create(dir: &Path) -> Result<Authority, FolderError> {
    let found = match is_empty(dir) {
        true => Authority::create(dir)
            .inspect(|_| tracing::info!(dir = %dir.display(), "a new root was made")),
        false => Authority::open(dir),
    };
    found.map_err(|source| failed(dir, source))
}

/// Whether there is nothing of an authority in the folder.
pub(super) fn is_empty(dir: &Path) -> bool {
    FILES.iter().all(|name| !dir.join(name).exists())
}

/// The authority in the folder as it is now.
pub(super) fn open(dir: &Path) -> Result<Authority, FolderError> {
    Authority::open(dir).map_err(|source| failed(dir, source))
}

fn failed(dir: &Path, source: AuthorityError) -> FolderError {
    FolderError::Authority {
        dir: dir.to_owned(),
        source,
    }
}

/// Copies an authority's files into a folder that does not exist yet. It appears when all of them
/// are on the disk, readable by nobody else.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), FolderError> {
    let copied = || -> io::Result<()> {
        let unfinished = to.with_extension("new");
        let _ = fs::remove_dir_all(&unfinished);
        private_dir(&unfinished)?;
        for name in FILES {
            let file = match File::open(from.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            let mut content = Zeroizing::new(Vec::new());
            file.take(FILE_MOST).read_to_end(&mut content)?;
            write_private(&unfinished.join(name), &content)?;
        }
        fs::rename(&unfinished, to)?;
        sync_parent(to)
    };
    copied().map_err(|source| FolderError::State {
        path: to.to_owned(),
        source,
    })
}

/// A folder that only its owner may look into.
pub(super) fn private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a file that only its owner may read, whole or not at all.
pub(super) fn replace_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let unfinished = path.with_extension("new");
    let _ = fs::remove_file(&unfinished);
    write_private(&unfinished, content)?;
    fs::rename(&unfinished, path)?;
    sync_parent(path)
}

fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent()
        .map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}
