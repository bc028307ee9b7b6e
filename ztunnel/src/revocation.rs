//! How the file of revoked certificates (`--crl-path`) is read, and reloaded when it changes.
//!
//! Its lists apply to new handshakes and to open tunnels, see [`hbone::Revocations`].

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hbone::{CrlError, Revocations};
use tokio_util::sync::CancellationToken;

/// How often the file is read. It is read whole and compared, which detects every way of replacing
/// it: in place, by a rename, and by the symbolic links of mounted volumes.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// Largest file that is read: room for 300,000 certificates.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RevocationError {
    /// The file cannot be read.
    #[error("cannot read the revocation lists in {file}")]
    File {
        /// The file.
        file: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The file holds no valid revocation lists.
    #[error("cannot use {file}")]
    Content {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        #[source]
        source: CrlError,
    },
}

/// The revocation file and the lists that are kept up to date from it.
#[derive(Debug)]
pub struct RevocationFile {
    path: PathBuf,
    revocations: Revocations,
    content: Vec<u8>,
}

impl RevocationFile {
    /// Reads the file for the first time. The daemon does not start without it: to ignore a file
    /// that the operator has named would accept revoked certificates.
    ///
    /// # Errors
    /// Fails if the file cannot be read or holds no valid revocation lists.
    pub fn open(path: &Path) -> Result<Self, RevocationError> {
        let mut file = Self {
            path: path.to_owned(),
            revocations: Revocations::none(),
            content: Vec::new(),
        };
        file.reload()?;
        Ok(file)
    }

    /// The lists, which follow the file while [`RevocationFile::run`] runs.
    pub fn revocations(&self) -> &Revocations {
        &self.revocations
    }

    /// Reloads the file when it changes, until cancelled. While it is missing or invalid, the last
    /// good lists stay in force. Each error is logged once.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut last_error = None;
        while stop
            .run_until_cancelled(tokio::time::sleep(RELOAD_INTERVAL))
            .await
            .is_some()
        {
            let result = self.reload().err().map(|error| error.to_string());
            if let Some(error) = result.as_ref().filter(|_| result != last_error) {
                let consequence = "the last good revocation lists stay in force";
                tracing::warn!(error, reason = "crl_unusable", "{consequence}");
            }
            last_error = result;
        }
    }

    fn reload(&mut self) -> Result<(), RevocationError> {
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
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut content)?;
    match u64::try_from(content.len()) {
        Ok(length) if length <= MAX_FILE_BYTES => Ok(content),
        _ => Err(io::Error::other(format!(
            "larger than {} MiB",
            MAX_FILE_BYTES >> 20
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A list with one revoked certificate, in DER.
    fn crl() -> Vec<u8> {
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
    fn missing_or_invalid_file_fails_at_the_start() {
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
    async fn unreadable_file_keeps_the_last_lists() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("crl.der");
        fs::write(&path, crl()).unwrap();
        let file = RevocationFile::open(&path).unwrap();
        let revocations = file.revocations().clone();
        assert_eq!(revocations.len(), 1);
        let stop = CancellationToken::new();
        let mut following = tokio::task::JoinSet::new();
        following.spawn(file.run(stop.clone()));
        fs::write(&path, "half a list").unwrap();
        tokio::time::sleep(RELOAD_INTERVAL * 2).await;
        assert_eq!(revocations.len(), 1);
        fs::write(&path, crl()).unwrap();
        tokio::time::sleep(RELOAD_INTERVAL * 2).await;
        assert_eq!(revocations.len(), 1);
        fs::remove_file(&path).unwrap();
        tokio::time::sleep(RELOAD_INTERVAL * 2).await;
        assert_eq!(revocations.len(), 1);
        stop.cancel();
        following.join_all().await;
    }
}
