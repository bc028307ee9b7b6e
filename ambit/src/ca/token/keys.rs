//! The files of the keys by which tokens are signed and checked.

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

/// A few, while one replaces another: each is tried on every token.
const KEYS_MOST: usize = 8;
const FILE_MOST: u64 = 64 * 1024;

/// Why a file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It cannot be read or written.
    #[error("cannot use the key file {file}")]
    File {
        /// Which.
        file: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Others could sign tokens for any workload.
    #[error("{file} may be read by others (mode {mode:o}); chmod 600 it")]
    Open {
        /// Which.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It does not hold what it should.
    #[error("{file} {message}")]
    Content {
        /// Which.
        file: PathBuf,
        /// For the operator.
        message: String,
    },
}

/// Makes a pair of keys for tokens: PKCS#8 and SubjectPublicKeyInfo, PEM. Overwrites neither file.
///
/// # Errors
/// Fails if a file exists already, or cannot be written.
pub fn create_keys(private: &Path, public: &Path) -> Result<(), KeyFileError> {
    let content = |message: String| KeyFileError::Content {
        file: private.to_owned(),
        message,
    };
    let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|error| content(format!("cannot be made: {error}")))?;
    let (secret, shown) = (Zeroizing::new(pair.serialize_pem()), pair.public_key_pem());
    pair.zeroize();
    write_new(private, secret.as_bytes(), 0o600)?;
    write_new(public, shown.as_bytes(), 0o644)
}

fn write_new(file: &Path, content: &[u8], mode: u32) -> Result<(), KeyFileError> {
    let mut options = OpenOptions::new();
    let opened = options.write(true).create_new(true).mode(mode).open(file);
    let written = opened.and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written.map_err(|source| KeyFileError::File {
        file: file.to_owned(),
        source,
    })
}

pub(super) fn private(file: &Path) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let (text, mode) = read(file)?;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Open {
            file: file.to_owned(),
            mode: mode & 0o777,
        });
    }
    let key = PrivatePkcs8KeyDer::from_pem_slice(&text).map_err(|_| KeyFileError::Content {
        file: file.to_owned(),
        message: "holds no private key as PKCS#8 in PEM".to_owned(),
    })?;
    Ok(Zeroizing::new(key.secret_pkcs8_der().to_vec()))
}

pub(super) fn public(file: &Path) -> Result<Vec<DecodingKey>, KeyFileError> {
    let (text, _) = read(file)?;
    let content = |message: &str| KeyFileError::Content {
        file: file.to_owned(),
        message: message.to_owned(),
    };
    let mut keys = Vec::new();
    for key in SubjectPublicKeyInfoDer::pem_slice_iter(&text) {
        let key = key.map_err(|_| content("is no PEM"))?;
        let point =
            point(&key).ok_or_else(|| content("holds a public key that is not of P-256"))?;
        keys.push(DecodingKey::from_ec_der(&point));
    }
    match keys.len() {
        0 => Err(content("holds no public key in PEM")),
        1..=KEYS_MOST => Ok(keys),
        _ => Err(content("holds too many public keys")),
    }
}

/// The point of a public key of P-256.
fn point(key: &[u8]) -> Option<Vec<u8>> {
    let (rest, key) = SubjectPublicKeyInfo::from_der(key).ok()?;
    let curve = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
    let p256 = key.algorithm.algorithm == x509_parser::oid_registry::OID_KEY_TYPE_EC_PUBLIC_KEY
        && curve == x509_parser::oid_registry::OID_EC_P256;
    (rest.is_empty() && p256).then(|| key.subject_public_key.data.to_vec())
}

fn read(path: &Path) -> Result<(Zeroizing<Vec<u8>>, u32), KeyFileError> {
    let read = || {
        let file = File::open(path)?;
        let mode = file.metadata()?.permissions().mode();
        let mut text = Zeroizing::new(Vec::new());
        file.take(FILE_MOST).read_to_end(&mut text)?;
        Ok((text, mode))
    };
    read().map_err(|source| KeyFileError::File {
        file: path.to_owned(),
        source,
    })
}
