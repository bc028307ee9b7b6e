//! Key files of tokens: how a key pair is created, and how private and public keys are read.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use jsonwebtoken::DecodingKey;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;
use zeroize::{Zeroize, Zeroizing};

/// Several keys are in the file while one replaces another. Each is tried on every token.
const MAX_KEYS: usize = 8;
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file cannot be read or written.
    #[error("cannot read or write the key file {file}")]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Others can read the file, and could sign tokens for any workload.
    #[error("{file} can be read by others (mode {mode:o}); chmod 600 it")]
    Permissions {
        /// The file.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The content is not the expected key.
    #[error("{file} {message}")]
    Content {
        /// The file.
        file: PathBuf,
        /// For the operator.
        message: String,
    },
}

/// Creates a key pair for tokens: PKCS#8 and SubjectPublicKeyInfo, PEM. Never overwrites a file.
///
/// # Errors
/// Fails if one of the files exists already or cannot be written.
pub fn create_keys(private: &Path, public: &Path) -> Result<(), KeyFileError> {
    let content = |message: String| KeyFileError::Content {
        file: private.to_owned(),
        message,
    };
    let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|error| content(format!("cannot be created: {error}")))?;
    let (private_pem, public_pem) = (Zeroizing::new(pair.serialize_pem()), pair.public_key_pem());
    pair.zeroize();
    write_new(private, private_pem.as_bytes(), 0o600)?;
    write_new(public, public_pem.as_bytes(), 0o644)
}

fn write_new(file: &Path, content: &[u8], mode: u32) -> Result<(), KeyFileError> {
    let mut options = OpenOptions::new();
    let opened = options.write(true).create_new(true).mode(mode).open(file);
    let written = opened.and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written.map_err(|source| KeyFileError::Io {
        file: file.to_owned(),
        source,
    })
}

/// Reads a private key in PKCS#8.
pub(super) fn read_private(file: &Path) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let (text, mode) = read(file)?;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Permissions {
            file: file.to_owned(),
            mode: mode & 0o777,
        });
    }
    let key = PrivatePkcs8KeyDer::from_pem_slice(&text).map_err(|_| KeyFileError::Content {
        file: file.to_owned(),
        message: "has no private key as PKCS#8 in PEM".to_owned(),
    })?;
    Ok(Zeroizing::new(key.secret_pkcs8_der().to_vec()))
}

/// Reads the public keys of a file.
pub(super) fn read_public(file: &Path) -> Result<Vec<DecodingKey>, KeyFileError> {
    let (text, _) = read(file)?;
    let content = |message: &str| KeyFileError::Content {
        file: file.to_owned(),
        message: message.to_owned(),
    };
    let mut keys = Vec::new();
    for key in SubjectPublicKeyInfoDer::pem_slice_iter(&text) {
        let key = key.map_err(|_| content("is not PEM"))?;
        let point =
            p256_point(&key).ok_or_else(|| content("has a public key that is not of P-256"))?;
        keys.push(DecodingKey::from_ec_der(&point));
    }
    match keys.len() {
        0 => Err(content("has no public key in PEM")),
        1..=MAX_KEYS => Ok(keys),
        _ => Err(content("has too many public keys")),
    }
}

/// The curve point of a P-256 public key.
fn p256_point(key: &[u8]) -> Option<Vec<u8>> {
    let (rest, key) = SubjectPublicKeyInfo::from_der(key).ok()?;
    let curve = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
    let p256 = key.algorithm.algorithm == x509_parser::oid_registry::OID_KEY_TYPE_EC_PUBLIC_KEY
        && curve == x509_parser::oid_registry::OID_EC_P256;
    (rest.is_empty() && p256).then(|| key.subject_public_key.data.to_vec())
}

/// The content of a file and its permission bits.
fn read(path: &Path) -> Result<(Zeroizing<Vec<u8>>, u32), KeyFileError> {
    let read = || {
        let file = File::open(path)?;
        let mode = file.metadata()?.permissions().mode();
        let mut text = Zeroizing::new(Vec::new());
        file.take(MAX_FILE_BYTES).read_to_end(&mut text)?;
        Ok((text, mode))
    };
    read().map_err(|source| KeyFileError::Io {
        file: path.to_owned(),
        source,
    })
}
