//! The files of a local certificate authority.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{Issuer, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use spiffe::SpiffeId;
use x509_parser::prelude::X509Certificate;
use zeroize::Zeroizing;

use super::{Authority, AuthorityError, Validity};
use crate::certs::TrustBundle;
use crate::certs::verify::{SKEW, at, chains};

const ROOT: &str = "root-cert.pem";
const CERT: &str = "ca-cert.pem";
const CHAIN: &str = "cert-chain.pem";
const KEY: &str = "ca-key.pem";
/// None of the files is larger than a few kilobytes.
const MAX_FILE: u64 = 1 << 20;

/// Key and root of a new authority: both are there afterwards, or what was begun is finished or made
/// anew by whoever comes next.
pub(super) fn write(dir: &Path, key: &str, root: &str) -> Result<(), AuthorityError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| unusable(dir, source))?;
    let _alone = alone(dir)?;
    for file in [ROOT, CERT, KEY].map(|name| dir.join(name)) {
        if file.exists() {
            return Err(AuthorityError::Exists { file });
        }
    }
    for (name, content, mode) in [(KEY, key, 0o600), (ROOT, root, 0o644)] {
        let file = unfinished(dir, name);
        write_new(&file, content, mode).map_err(|source| unusable(&file, source))?;
    }
    sync(dir)?;
    // In this order, and nothing before both are on the disk: a key without its root is finished.
    show(dir, KEY)?;
    show(dir, ROOT)?;
    sync(dir)
}

/// Finishes what a process that died has begun to write.
fn finish(dir: &Path) -> Result<(), AuthorityError> {
    let there = |name| dir.join(name).exists();
    let begun = || there(KEY) && !there(ROOT) && !there(CERT) && unfinished(dir, ROOT).exists();
    if !begun() {
        return Ok(());
    }
    // Whoever is writing just now has finished when it is let go.
    let _alone = alone(dir)?;
    if !begun() {
        return Ok(());
    }
    let key = read_key(&dir.join(KEY))?;
    let roots = certificates(&unfinished(dir, ROOT))?;
    match roots
        .first()
        .is_some_and(|root| belongs(root, key.public_key_raw()))
    {
        true => show(dir, ROOT).and_then(|()| sync(dir)),
        // The key is another one: that a root is missing is for whoever put it there to hear.
        false => Ok(()),
    }
}

/// Of all processes, while it is held; and let go by one that dies.
fn alone(dir: &Path) -> Result<File, AuthorityError> {
    let locked = File::open(dir).and_then(|folder| folder.lock().map(|()| folder));
    locked.map_err(|source| unusable(dir, source))
}

fn unfinished(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.new"))
}

fn show(dir: &Path, name: &str) -> Result<(), AuthorityError> {
    let file = dir.join(name);
    fs::rename(unfinished(dir, name), &file).map_err(|source| unusable(&file, source))
}

fn sync(dir: &Path) -> Result<(), AuthorityError> {
    let synced = File::open(dir).and_then(|folder| folder.sync_all());
    synced.map_err(|source| unusable(dir, source))
}

fn write_new(file: &Path, content: &str, mode: u32) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(file)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()
}

fn unusable(file: &Path, source: io::Error) -> AuthorityError {
    AuthorityError::File {
        file: file.to_owned(),
        source,
    }
}

/// Everything in the folder has to fit together: files that are being replaced one after the other
/// are an error until the last is there.
pub(super) fn read(dir: &Path) -> Result<Authority, AuthorityError> {
    finish(dir)?;
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
    check(&signer, &public_key).map_err(content)?;
    let issuer = Issuer::from_ca_cert_der(&signer, key).map_err(|e| content(e.to_string()))?;
    // A root among the intermediates would be sent to every peer for nothing.
    let intermediates = intermediates
        .into_iter()
        .filter(|certificate| !bundle.roots().contains(certificate))
        .collect::<Vec<_>>();
    let now = SystemTime::now();
    let (not_before, not_after) = validity(&signer, &intermediates, now).map_err(content)?;
    let authority = Authority {
        issuer,
        public_key,
        intermediates,
        bundle,
        not_after,
    };
    try_out(&authority, not_before, now).map_err(content)?;
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
        let metadata = fs::metadata(dir.join(name)).ok()?;
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
    read().map_err(|source| unusable(path, source))
}

/// Whether it is an authority's certificate, and the key its own.
fn check(signer: &CertificateDer<'_>, key: &[u8]) -> Result<(), String> {
    if !parsed(signer)?.is_ca() {
        return Err("is no certificate of an authority".to_owned());
    }
    match belongs(signer, key) {
        true => Ok(()),
        false => Err(format!("does not belong to the key in {KEY}")),
    }
}

fn parsed<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, String> {
    x509_parser::parse_x509_certificate(der)
        .map(|(_, parsed)| parsed)
        .map_err(|error| format!("is no certificate: {error}"))
}

/// From when to when the signer and all that is between it and the root are valid: what they sign is
/// worth nothing before and after. Of several certificates of one name the one counts that has begun,
/// and ends last.
fn validity(
    signer: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: SystemTime,
) -> Result<(SystemTime, SystemTime), String> {
    let others = intermediates.iter().map(parsed);
    let mut others = others.collect::<Result<Vec<_>, _>>()?;
    let mut of = parsed(signer)?;
    let start = |of: &X509Certificate<'_>| at(of.validity().not_before.timestamp());
    let end = |of: &X509Certificate<'_>| at(of.validity().not_after.timestamp());
    let (mut not_before, mut not_after) = (start(&of), end(&of));
    loop {
        others.retain(|other| other.subject() != of.subject());
        let issuers = others.iter().filter(|other| other.subject() == of.issuer());
        let best = issuers.max_by_key(|other| (start(other) <= now + SKEW, end(other)));
        let Some(issuer) = best.cloned() else {
            return Ok((not_before, not_after));
        };
        not_before = not_before.max(start(&issuer));
        not_after = not_after.min(end(&issuer));
        of = issuer;
    }
}

fn belongs(certificate: &CertificateDer<'_>, key: &[u8]) -> bool {
    x509_parser::parse_x509_certificate(certificate)
        .is_ok_and(|(_, parsed)| *parsed.public_key().subject_public_key.data == *key)
}

/// A signer whose signatures nobody would accept is not used, however well its key fits: it is tried
/// with a leaf that nobody gets, now. One that has expired is tried when it had not: that it signs no
/// more is for whoever asks it to hear.
fn try_out(authority: &Authority, start: SystemTime, now: SystemTime) -> Result<(), String> {
    const BLINK: Duration = Duration::from_secs(1);
    if start > now + SKEW {
        let ahead = start.duration_since(now).unwrap_or_default();
        return Err(format!(
            "is not valid for another {ahead:.0?}, it or what is between it and the root"
        ));
    }
    let probe = SpiffeId::new("spiffe://probe.invalid/probe").map_err(|e| e.to_string())?;
    let from = now.min(authority.not_after - BLINK * 2).max(start);
    let validity = Validity {
        not_before: from,
        not_after: from + BLINK * 2,
    };
    let issued = authority.issue(&probe, validity);
    let issued = issued.map_err(|error| format!("cannot sign: {error}"))?;
    chains(&issued.chain, &authority.bundle, from + BLINK)
        .map_err(|error| format!("does not chain to {ROOT}: {error}"))
}
