//! Why can the folder of a CA not be used?

use std::path::{Path, PathBuf};

/// Why the folder of an [`Authority`](super::Authority) cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file cannot be read or written.
    #[error("cannot read or write the CA file {file}")]
    File {
        /// The file.
        file: PathBuf,
        /// The error of the operating system.
        #[source]
        source: std::io::Error,
    },
    /// The folder already has a CA. Overwriting it would invalidate every certificate in use.
    #[error("{file} already exists; remove the folder to create a new certificate authority")]
    Exists {
        /// The existing file.
        file: PathBuf,
    },
    /// Other users can read the key, and could sign for any workload.
    #[error("{file} is readable by other users (mode {mode:o}); run chmod 600 on it")]
    KeyIsOpen {
        /// The key file.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file has unexpected content.
    #[error("{file}: {message}")]
    Content {
        /// The file.
        file: PathBuf,
        /// Message for the operator.
        message: String,
    },
}

impl AuthorityError {
    pub(super) fn file(file: &Path, source: std::io::Error) -> Self {
        Self::File {
            file: file.to_owned(),
            source,
        }
    }

    pub(super) fn content(file: &Path, message: impl Into<String>) -> Self {
        Self::Content {
            file: file.to_owned(),
            message: message.into(),
        }
    }
}
