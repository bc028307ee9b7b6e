//! Which files make up a CA, and do they belong together?

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rcgen::KeyPair;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::X509Certificate;
use zeroize::Zeroizing;

use super::error::AuthorityError;
use crate::certs::trust_bundle::TrustBundle;

pub(super) const ROOT: &str = "root-cert.pem";
pub(super) const CERT: &str = "ca-cert.pem";
pub(super) const KEY: &str = "ca-key.pem";
/// Istio's third certificate file. Optional.
const CHAIN: &str = "cert-chain.pem";
/// A limit: each of the files has a few kilobytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The files of a CA, read and matched.
pub(super) struct CaFiles {
    pub(super) key: KeyPair,
    pub(super) bundle: TrustBundle,
    /// The certificate of `key`.
    pub(super) signer: CertificateDer<'static>,
    /// The file that holds `signer`.
    pub(super) signer_file: PathBuf,
    /// `signer`, unless it is a root, and the certificates between it and the root.
    pub(super) intermediates: Vec<CertificateDer<'static>>,
}

/// Reads the files of a folder.
///
/// # Errors
/// Fails if a file cannot be read, or if the key does not belong to the signer's certificate.
pub(super) fn load(dir: &Path) -> Result<CaFiles, AuthorityError> {
    let [root_file, cert_file, key_file] = [ROOT, CERT, KEY].map(|name| dir.join(name));
    let key = read_key(&key_file)?;
    let roots = read_certificates(&root_file)?;
    let bundle = TrustBundle::new(roots)
        .map_err(|error| AuthorityError::content(&root_file, error.to_string()))?;
    let intermediates = read_intermediates(&cert_file, &dir.join(CHAIN))?;
    let (signer_file, signer) = match intermediates.first() {
        Some(signer) => (cert_file, signer.clone()),
        None => {
            let matches = |root: &&CertificateDer<'_>| has_key(root, key.public_key_raw());
            let signer = bundle.roots().iter().find(matches).ok_or_else(|| {
                let message = format!("does not belong to the key in {KEY}");
                AuthorityError::content(&root_file, message)
            })?;
            (root_file, signer.clone())
        }
    };
    check_signer(&signer, key.public_key_raw())
        .map_err(|message| AuthorityError::content(&signer_file, message))?;
    // Peers have the roots. A root among the intermediates would be sent to them for nothing.
    let intermediates = intermediates
        .into_iter()
        .filter(|certificate| !bundle.roots().contains(certificate))
        .collect();
    Ok(CaFiles {
        key,
        bundle,
        signer,
        signer_file,
        intermediates,
    })
}

/// The signing certificate and the certificates between it and the root. Istio's chain file repeats
/// the first of them and may end with the root.
fn read_intermediates(
    cert_file: &Path,
    chain_file: &Path,
) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    if !cert_file.exists() {
        return Ok(Vec::new());
    }
    let mut found = read_certificates(cert_file)?;
    if chain_file.exists() {
        let further = read_certificates(chain_file)?.into_iter();
        let further: Vec<_> = further.filter(|one| !found.contains(one)).collect();
        found.extend(further);
    }
    Ok(found)
}

/// Identifies one version of a file: it changes when the file is written or replaced, also behind a
/// symbolic link.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::certs) struct FileStamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// The stamps of the CA's files. None for a file that does not exist.
pub(in crate::certs) fn file_stamps(dir: &Path) -> [Option<FileStamp>; 4] {
    [ROOT, CERT, CHAIN, KEY].map(|name| {
        let metadata = fs::metadata(dir.join(name)).ok()?;
        Some(FileStamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    })
}

/// Reads a private key that only its owner can read.
pub(super) fn read_key(file: &Path) -> Result<KeyPair, AuthorityError> {
    let (text, mode) = read_file(file)?;
    if mode & 0o077 != 0 {
        return Err(AuthorityError::KeyIsOpen {
            file: file.to_owned(),
            mode: mode & 0o777,
        });
    }
    KeyPair::from_pem(&text).map_err(|error| {
        let message = format!("is not a PKCS#8 private key in PEM: {error}");
        AuthorityError::content(file, message)
    })
}

/// Reads at least one certificate.
pub(super) fn read_certificates(
    file: &Path,
) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let (text, _) = read_file(file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let message = match found {
        Ok(found) if !found.is_empty() => return Ok(found),
        Ok(_) => "has no certificate in PEM".to_owned(),
        Err(error) => format!("is not valid PEM: {error}"),
    };
    Err(AuthorityError::content(file, message))
}

fn read_file(path: &Path) -> Result<(Zeroizing<String>, u32), AuthorityError> {
    let read = || {
        let file = File::open(path)?;
        let mode = file.metadata()?.permissions().mode();
        let mut text = Zeroizing::new(String::new());
        file.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
        Ok((text, mode))
    };
    read().map_err(|source| AuthorityError::file(path, source))
}

/// Checks that this is a CA certificate for this public key.
fn check_signer(signer: &CertificateDer<'_>, public_key: &[u8]) -> Result<(), String> {
    if !parse(signer)?.is_ca() {
        return Err("is not a CA certificate".to_owned());
    }
    match has_key(signer, public_key) {
        true => Ok(()),
        false => Err(format!("does not belong to the key in {KEY}")),
    }
}

/// Whether a certificate is for this public key.
pub(super) fn has_key(certificate: &CertificateDer<'_>, public_key: &[u8]) -> bool {
    x509_parser::parse_x509_certificate(certificate)
        .is_ok_and(|(_, parsed)| *parsed.public_key().subject_public_key.data == *public_key)
}

pub(super) fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    x509_parser::parse_x509_certificate(der)
        .map(|(_, parsed)| parsed)
        .map_err(|error| format!("cannot be parsed as a certificate: {error}"))
}
