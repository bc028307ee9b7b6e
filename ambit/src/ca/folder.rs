//! Files of a certificate authority: how its folder is read, created and copied, and how private
//! files are written.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use mesh::certs::{Authority, AuthorityError};
use rustls_pki_types::CertificateDer;
use zeroize::Zeroizing;

/// Istio's names. The key is copied last: a folder that contains it is complete.
const FILES: [&str; 4] = [
    "root-cert.pem",
    "ca-cert.pem",
    "cert-chain.pem",
    "ca-key.pem",
];
/// The files have a few kilobytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why the folder of the authority, or the folder of its state, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The files are not those of a valid authority.
    #[error("the certificate authority in {dir} cannot be used")]
    Authority {
        /// The folder.
        dir: PathBuf,
        /// The cause.
        #[source]
        source: AuthorityError,
    },
    /// The folder is empty, but the state shows that there was an authority.
    #[error(
        "there is no certificate authority in {dir}, but {state} has the state of one: put its \
         files back (copies are in {state}), or put a new one there, or remove {state} to start \
         with a new root that no workload trusts yet"
    )]
    Missing {
        /// The folder.
        dir: PathBuf,
        /// The folder of the state.
        state: PathBuf,
    },
    /// A file of the state cannot be read or written.
    #[error(
        "cannot store the state of the authority in {path}; set another folder with --state-dir"
    )]
    State {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The state is malformed. Without it, roots that are still needed would be withdrawn.
    #[error(
        "{path} is not a valid state of the authority: {message}; remove it to discard the state"
    )]
    InvalidState {
        /// The file.
        path: PathBuf,
        /// For the operator.
        message: String,
    },
}

/// Opens the authority in the folder. If the folder has none of the files, creates an authority with
/// a new root.
pub(super) fn open_or_create(dir: &Path) -> Result<Authority, FolderError> {
    if !is_empty(dir) {
        return open(dir);
    }
    let created = Authority::create(dir).map_err(|source| authority_error(dir, source))?;
    tracing::info!(dir = %dir.display(), "created a new root certificate");
    Ok(created)
}

/// Whether the folder has none of the authority's files.
pub(super) fn is_empty(dir: &Path) -> bool {
    FILES.iter().all(|name| !dir.join(name).exists())
}

/// Opens the authority in the folder.
pub(super) fn open(dir: &Path) -> Result<Authority, FolderError> {
    Authority::open(dir).map_err(|source| authority_error(dir, source))
}

fn authority_error(dir: &Path, source: AuthorityError) -> FolderError {
    FolderError::Authority {
        dir: dir.to_owned(),
        source,
    }
}

/// Copies an authority's files into a new folder that only its owner can read. The folder is renamed
/// into place after all files are on disk.
pub(super) fn copy(from: &Path, to: &Path) -> Result<(), FolderError> {
    let copy_files = || -> io::Result<()> {
        let temporary = to.with_extension("new");
        let _ = fs::remove_dir_all(&temporary);
        create_private_dir(&temporary)?;
        for name in FILES {
            let file = match File::open(from.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            let mut content = Zeroizing::new(Vec::new());
            file.take(MAX_FILE_BYTES).read_to_end(&mut content)?;
            write_private(&temporary.join(name), &content)?;
        }
        fs::rename(&temporary, to)?;
        sync_parent(to)
    };
    copy_files().map_err(|source| FolderError::State {
        path: to.to_owned(),
        source,
    })
}

/// Creates a folder that only its owner can read, if it does not exist.
pub(super) fn create_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Replaces a file atomically by one that only its owner can read.
pub(super) fn replace_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    write_private(&temporary, content)?;
    fs::rename(&temporary, path)?;
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

/// A certificate in PEM.
pub(super) fn to_pem(certificate: &CertificateDer<'_>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    let certificate = pem::Pem::new("CERTIFICATE", certificate.as_ref());
    pem::encode_config(&certificate, config)
}
