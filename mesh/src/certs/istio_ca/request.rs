//! What does a request contain: a new key's CSR, the identity, the lifetime and the token?

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use spiffe::SpiffeId;
use tonic::Request;
use tonic::metadata::{AsciiMetadataValue, MetadataValue};
use zeroize::{Zeroize, Zeroizing};

use super::proto::IstioCertificateRequest;
use crate::certs::source::IssueFailure;

/// The metadata field that names the identity, if it is not the caller's own.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// No token is larger.
const MAX_TOKEN_BYTES: u64 = 64 * 1024;

/// A private key and its certificate signing request.
pub(super) struct CsrRequest {
    csr: String,
    identity: String,
    validity_seconds: i64,
    /// PKCS#8.
    pub(super) key: Zeroizing<Vec<u8>>,
}

impl CsrRequest {
    /// Generates a key and its CSR.
    pub(super) fn new(identity: &SpiffeId, ttl: Duration) -> Result<Self, IssueFailure> {
        let (csr, key) = new_csr(identity).map_err(|error| {
            IssueFailure::new("signing_failed", format!("cannot create a CSR: {error}"))
        })?;
        Ok(Self {
            csr,
            identity: identity.to_string(),
            validity_seconds: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            key,
        })
    }

    /// The gRPC message, with the current content of the token file.
    pub(super) fn message(
        &self,
        token: &Path,
        cluster_id: &str,
    ) -> Result<Request<IstioCertificateRequest>, String> {
        let identity = Value {
            kind: Some(Kind::StringValue(self.identity.clone())),
        };
        let mut request = Request::new(IstioCertificateRequest {
            csr: self.csr.clone(),
            validity_duration: self.validity_seconds,
            metadata: Some(Struct {
                fields: [(IMPERSONATED_IDENTITY.to_owned(), identity)].into(),
            }),
        });
        let header = |value: &str| -> Result<AsciiMetadataValue, String> {
            MetadataValue::try_from(value).map_err(|_| "it cannot be sent as a header".to_owned())
        };
        let mut bearer = header(&read_bearer(token)?)
            .map_err(|error| format!("the token in {}: {error}", token.display()))?;
        bearer.set_sensitive(true);
        request.metadata_mut().insert("authorization", bearer);
        request
            .metadata_mut()
            .insert("clusterid", header(cluster_id)?);
        Ok(request)
    }
}

/// Whether a text can be the value of a header.
pub(super) fn is_header_value(text: &str) -> bool {
    AsciiMetadataValue::try_from(text).is_ok()
}

/// The identity is the only name of the CSR, for CAs that read it there.
fn new_csr(identity: &SpiffeId) -> Result<(String, Zeroizing<Vec<u8>>), rcgen::Error> {
    let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    let csr = params.serialize_request(&pair).and_then(|csr| csr.pem());
    let key = Zeroizing::new(pair.serialize_der());
    pair.zeroize();
    Ok((csr?, key))
}

fn read_bearer(file: &Path) -> Result<Zeroizing<String>, String> {
    let mut token = Zeroizing::new(String::new());
    let read =
        File::open(file).and_then(|file| file.take(MAX_TOKEN_BYTES).read_to_string(&mut token));
    read.map_err(|error| format!("cannot read the token file {}: {error}", file.display()))?;
    match token.trim() {
        "" => Err(format!("the token file {} is empty", file.display())),
        token => Ok(Zeroizing::new(format!("Bearer {token}"))),
    }
}
