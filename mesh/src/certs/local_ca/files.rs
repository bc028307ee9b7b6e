//! The files of a local certificate authority.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rcgen::{Issuer, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

use super::{LocalCa, LocalCaError, at};

const ROOT: &str = "root-cert.pem";
const CERT: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
/// None of the files is larger than a few kilobytes.
const MAX_FILE: u64 = 1 << 20;

pub(super) fn write(dir: &Path, key: &str, root: &str) -> Result<(), LocalCaError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| LocalCaError::File {
        file: dir.to_owned(),
        source,
    })?;
    for file in [ROOT, CERT].map(|name| dir.join(name)) {
        if file.exists() {
            return Err(LocalCaError::Exists { file });
        }
    }
    // The key goes first: whoever of two writers makes it goes on, and the other stops here.
    write_new(&dir.join(KEY), key, 0o600)?;
    write_new(&dir.join(ROOT), root, 0o644)
}

fn write_new(file: &Path, content: &str, mode: u32) -> Result<(), LocalCaError> {
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(file);
    let written = written.and_then(|mut file| {
        file.write_all(content.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => LocalCaError::Exists {
            file: file.to_owned(),
        },
        _ => LocalCaError::File {
            file: file.to_owned(),
            source,
        },
    })
}

pub(super) fn read(dir: &Path) -> Result<LocalCa, LocalCaError> {
    let [root_file, cert_file, key_file] = [ROOT, CERT, KEY].map(|name| dir.join(name));
    let key = read_key(&key_file)?;
    let roots = certificates(&root_file)?;
    let intermediates = if cert_file.exists() {
        certificates(&cert_file)?
    } else {
        Vec::new()
    };
    let (file, signer) = match intermediates.first() {
        Some(signer) => (&cert_file, signer.clone()),
        // `certificates` never gives an empty list.
        None => (&root_file, roots[0].clone()),
    };
    let content = |message: String| LocalCaError::Content {
        file: file.clone(),
        message,
    };
    let not_after = check(&signer, &key).map_err(content)?;
    let issuer = Issuer::from_ca_cert_der(&signer, key).map_err(|e| content(e.to_string()))?;
    // A root among the intermediates would be sent to every peer for nothing.
    let intermediates = intermediates
        .into_iter()
        .filter(|c| !roots.contains(c))
        .collect();
    Ok(LocalCa {
        issuer,
        intermediates,
        roots,
        not_after,
    })
}

fn read_key(file: &Path) -> Result<KeyPair, LocalCaError> {
    let (text, mode) = read_file(file)?;
    if mode & 0o077 != 0 {
        return Err(LocalCaError::KeyIsOpen {
            file: file.to_owned(),
            mode: mode & 0o777,
        });
    }
    KeyPair::from_pem(&text).map_err(|error| LocalCaError::Content {
        file: file.to_owned(),
        message: format!("is no PKCS#8 private key in PEM: {error}"),
    })
}

/// At least one certificate.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, LocalCaError> {
    let (text, _) = read_file(file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let message = match found {
        Ok(found) if !found.is_empty() => return Ok(found),
        Ok(_) => "holds no certificate in PEM".to_owned(),
        Err(error) => format!("is no PEM: {error}"),
    };
    Err(LocalCaError::Content {
        file: file.to_owned(),
        message,
    })
}

fn read_file(path: &Path) -> Result<(Zeroizing<String>, u32), LocalCaError> {
    let read = || {
        let file = File::open(path)?;
        let mode = file.metadata()?.permissions().mode();
        let mut text = Zeroizing::new(String::new());
        file.take(MAX_FILE).read_to_string(&mut text)?;
        Ok((text, mode))
    };
    read().map_err(|source| LocalCaError::File {
        file: PathBuf::from(path),
        source,
    })
}

/// The end of the signer's validity, if it is an authority and the key is its own.
fn check(signer: &CertificateDer<'_>, key: &KeyPair) -> Result<SystemTime, String> {
    let (_, signer) = x509_parser::parse_x509_certificate(signer)
        .map_err(|error| format!("is no certificate: {error}"))?;
    if !signer.is_ca() {
        return Err("is no certificate of an authority".to_owned());
    }
    if &*signer.public_key().subject_public_key.data != key.public_key_raw() {
        return Err(format!("does not belong to the key in {KEY}"));
    }
    Ok(at(signer.validity().not_after.timestamp()))
}
