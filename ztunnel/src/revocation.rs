//! The file of revoked certificates (`--crl-path`): read at the start, followed from then on.
//!
//! What it says counts for new handshakes and for open tunnels alike, see [`hbone::Revocations`].

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hbone::{CrlError, Revocations};
use tokio_util::sync::CancellationToken;

/// How often the file is looked at. It is read whole, which finds every way of replacing it: in
/// place, by a rename, and by the symbolic links of mounted volumes.
const LOOK: Duration = Duration::from_secs(1);

/// A list of 300,000 certificates. No larger one is read.
const MAX_FILE: u64 = 16 << 20;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RevocationError {
    /// It cannot be read.
    #[error("cannot read the revocation lists in {file}")]
    File {
        /// The file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("cannot use {file}")]
    Content {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        #[source]
        source: CrlError,
    },
}

/// The file, and the lists that it keeps up to date.
#[derive(Debug)]
pub struct RevocationFile {
    path: PathBuf,
    revocations: Revocations,
    content: Vec<u8>,
}

impl RevocationFile {
    /// Reads the file for the first time. An operator who names a file wants it to count, so that
    /// without it nothing starts.
    ///
    /// # Errors
    /// Fails if it cannot be read or holds something else.
    pub fn open(path: &Path) -> Result<Self, RevocationError> {
        let mut file = Self {
            path: path.to_owned(),
            revocations: Revocations::none(),
            content: Vec::new(),
        };
        file.look()?;
        Ok(file)
    }

    /// What the file says, now and later.
    pub fn revocations(&self) -> &Revocations {
        &self.revocations
    }

    /// Follows the file until cancelled. One that is gone or not understood leaves the last good
    /// lists in force, and is reported once.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut complaint = None;
        while stop
            .run_until_cancelled(tokio::time::sleep(LOOK))
            .await
            .is_some()
        {
            let complains = self.look().err().map(|error| error.to_string());
            if let Some(error) = complains.as_ref().filter(|_| complains != complaint) {
                let lists = "the last good revocation lists stay in force";
                tracing::warn!(error, reason = "crl_unusable", "{lists}");
            }
            complaint = complains;
        }
    }

    fn look(&mut self) -> Result<(), RevocationError> {
        let content = read(&self.path).map_err(|source| RevocationError::File {
            file: self.path.clone(),
            source,
        })?;
        if content == self.content {
            return Ok(());
        }
        self.revocations
            .replace(&content)
            .map_err(|source| RevocationError::Content {
                file: self.path.clone(),
                source,
            })?;
        self.content = content;
        let (file, certificates) = (self.path.display(), self.revocations.len());
        tracing::info!(%file, certificates, "revocation lists read");
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?
        .take(MAX_FILE + 1)
        .read_to_end(&mut content)?;
    match u64::try_from(content.len()) {
        Ok(length) if length <= MAX_FILE => Ok(content),
        _ => Err(io::Error::other(format!(
            "larger than {} MiB",
            MAX_FILE >> 20
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// An empty list of a test's own authority, made once by rcgen: it is well-formed DER.
    fn list() -> Vec<u8> {
        use rcgen::{
            BasicConstraints, CertificateParams, CertificateRevocationListParams, IsCa, Issuer,
            KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
        };
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::CrlSign];
        let issuer = Issuer::new(params, KeyPair::generate().unwrap());
        let now = time::OffsetDateTime::now_utc();
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(7_u64),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now,
            next_update: now + Duration::from_secs(3600),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&issuer).unwrap().der().to_vec()
    }

    #[test]
    fn without_its_file_nothing_starts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("crl.pem");
        assert!(matches!(
            RevocationFile::open(&path),
            Err(RevocationError::File { .. })
        ));
        fs::write(&path, "not a list").unwrap();
        assert!(matches!(
            RevocationFile::open(&path),
            Err(RevocationError::Content { .. })
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn the_file_is_followed_and_what_cannot_be_read_leaves_the_last_lists() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("crl.der");
        fs::write(&path, list()).unwrap();
        let file = RevocationFile::open(&path).unwrap();
        let revocations = file.revocations().clone();
        assert_eq!(revocations.len(), 1);
        let stop = CancellationToken::new();
        let mut following = tokio::task::JoinSet::new();
        following.spawn(file.run(stop.clone()));
        fs::write(&path, "half a list").unwrap();
        tokio::time::sleep(LOOK * 2).await;
        assert_eq!(revocations.len(), 1);
        fs::write(&path, [list(), Vec::new()].concat()).unwrap();
        tokio::time::sleep(LOOK * 2).await;
        assert_eq!(revocations.len(), 1);
        fs::remove_file(&path).unwrap();
        tokio::time::sleep(LOOK * 2).await;
        assert_eq!(revocations.len(), 1);
        stop.cancel();
        following.join_all().await;
    }
}
