//! The files of a local certificate authority.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{Issuer, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use spiffe::SpiffeId;
use zeroize::Zeroizing;

use super::{Authority, AuthorityError, Validity};
use crate::certs::TrustBundle;
use crate::certs::verify::{at, chains};

const ROOT: &str = "root-cert.pem";
const CERT: &str = "ca-cert.pem";
const CHAIN: &str = "cert-chain.pem";
const KEY: &str = "ca-key.pem";
/// None of the files is larger than a few kilobytes.
const MAX_FILE: u64 = 1 << 20;

pub(super) fn write(dir: &Path, key: &str, root: &str) -> Result<(), AuthorityError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| AuthorityError::File {
        file: dir.to_owned(),
        source,
    })?;
    for file in [ROOT, CERT].map(|name| dir.join(name)) {
        if file.exists() {
            return Err(AuthorityError::Exists { file });
        }
    }
    // The key goes first: whoever of two writers makes it goes on, and the other stops here.
    write_new(&dir.join(KEY), key, 0o600)?;
    write_new(&dir.join(ROOT), root, 0o644)
}

fn write_new(file: &Path, content: &str, mode: u32) -> Result<(), AuthorityError> {
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
        io::ErrorKind::AlreadyExists => AuthorityError::Exists {
            file: file.to_owned(),
        },
        _ => AuthorityError::File {
            file: file.to_owned(),
            source,
        },
    })
}

/// Everything in the folder has to fit together: files that are being replaced one after the other
/// are an error until the last is there.
pub(super) fn read(dir: &Path) -> Result<Authority, AuthorityError> {
    let [root_file, cert_file, key_file] = [ROOT, CERT, KEY].map(|name| dir.join(name));
    let in_file = |file: &Path, message: String| AuthorityError::Content {
        file: file.to_owned(),
        message,
    };
    let key = read_key(&key_file)?;
    let public_key = key.public_key_raw().to_vec();
    let roots = certificates(&root_file)?;
    let bundle = TrustBundle::new(roots).map_err(|e| in_file(&root_file, e.to_string()))?;
    let intermediates = intermediates(&cert_file, &dir.join(CHAIN))?;
    let (file, signer) = match intermediates.first() {
        Some(signer) => (&cert_file, signer.clone()),
        None => {
            let own = |root: &&CertificateDer<'_>| belongs(root, &public_key);
            let signer = bundle.roots().iter().find(own).ok_or_else(|| {
                in_file(&root_file, format!("does not belong to the key in {KEY}"))
            })?;
            (&root_file, signer.clone())
        }
    };
    let content = |message: String| in_file(file, message);
    let (not_before, not_after) = check(&signer, &public_key).map_err(content)?;
    let issuer = Issuer::from_ca_cert_der(&signer, key).map_err(|e| content(e.to_string()))?;
    // A root among the intermediates would be sent to every peer for nothing.
    let intermediates = intermediates
        .into_iter()
        .filter(|certificate| !bundle.roots().contains(certificate))
        .collect::<Vec<_>>();
    let authority = Authority {
        issuer,
        public_key,
        intermediates,
        bundle,
        not_after,
    };
    try_out(&authority, not_before).map_err(content)?;
    Ok(authority)
}

/// The certificate that signs, and what is between it and the root. Istio's third file, which may be
/// left out, repeats the first of them and may end with the root.
fn intermediates(
    signer: &Path,
    chain: &Path,
) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    if !signer.exists() {
        return Ok(Vec::new());
    }
    let mut found = certificates(signer)?;
    if chain.exists() {
        let further = certificates(chain)?.into_iter();
        let further: Vec<_> = further.filter(|one| !found.contains(one)).collect();
        found.extend(further);
    }
    Ok(found)
}

/// Tells whether a file was written or replaced, through whatever links lead to it.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::certs) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// Those of the authority's files; none for what is not there.
pub(in crate::certs) fn stamps(dir: &Path) -> [Option<Stamp>; 4] {
    [ROOT, CERT, CHAIN, KEY].map(|name| {
        let metadata = std::fs::metadata(dir.join(name)).ok()?;
        Some(Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    })
}

fn read_key(file: &Path) -> Result<KeyPair, AuthorityError> {
    let (text, mode) = read_file(file)?;
    if mode & 0o077 != 0 {
        return Err(AuthorityError::KeyIsOpen {
            file: file.to_owned(),
            mode: mode & 0o777,
        });
    }
    KeyPair::from_pem(&text).map_err(|error| AuthorityError::Content {
        file: file.to_owned(),
        message: format!("is no PKCS#8 private key in PEM: {error}"),
    })
}

/// At least one certificate.
fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let (text, _) = read_file(file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let message = match found {
        Ok(found) if !found.is_empty() => return Ok(found),
        Ok(_) => "holds no certificate in PEM".to_owned(),
        Err(error) => format!("is no PEM: {error}"),
    };
    Err(AuthorityError::Content {
        file: file.to_owned(),
        message,
    })
}

fn read_file(path: &Path) -> Result<(Zeroizing<String>, u32), AuthorityError> {
    let read = || {
        let file = File::open(path)?;
        let mode = file.metadata()?.permissions().mode();
        let mut text = Zeroizing::new(String::new());
        file.take(MAX_FILE).read_to_string(&mut text)?;
        Ok((text, mode))
    };
    read().map_err(|source| AuthorityError::File {
        file: PathBuf::from(path),
        source,
    })
}

/// The signer's validity, if it is an authority and the key is its own.
fn check(signer: &CertificateDer<'_>, key: &[u8]) -> Result<(SystemTime, SystemTime), String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(signer)
        .map_err(|error| format!("is no certificate: {error}"))?;
    if !parsed.is_ca() {
        return Err("is no certificate of an authority".to_owned());
    }
    if !belongs(signer, key) {
        return Err(format!("does not belong to the key in {KEY}"));
    }
    let validity = parsed.validity();
    Ok((
        at(validity.not_before.timestamp()),
        at(validity.not_after.timestamp()),
    ))
}

fn belongs(certificate: &CertificateDer<'_>, key: &[u8]) -> bool {
    x509_parser::parse_x509_certificate(certificate)
        .is_ok_and(|(_, parsed)| *parsed.public_key().subject_public_key.data == *key)
}

/// A signer whose signatures nobody would accept is not used, however well its key fits: it is tried
/// with a leaf that nobody gets, at the start of its own validity.
fn try_out(authority: &Authority, start: SystemTime) -> Result<(), String> {
    let probe = SpiffeId::new("spiffe://probe.invalid/probe").map_err(|e| e.to_string())?;
    let validity = Validity {
        not_before: start,
        not_after: start + Duration::from_secs(1),
    };
    let issued = authority.issue(&probe, validity);
    let issued = issued.map_err(|error| format!("cannot sign: {error}"))?;
    chains(&issued.chain, &authority.bundle, start)
        .map_err(|error| format!("does not chain to {ROOT}: {error}"))
}
