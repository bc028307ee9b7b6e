//! What is asked: a new key's certificate for one identity.

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

use super::Fault;
use super::proto::IstioCertificateRequest;

/// The name under which an authority looks for the identity, if it is not the caller's own.
const IMPERSONATED: &str = "ImpersonatedIdentity";
/// No token is larger.
const TOKEN_MOST: u64 = 64 * 1024;

/// A key and the request to certify it.
pub(super) struct Asking {
    csr: String,
    identity: String,
    seconds: i64,
    /// PKCS#8.
    pub(super) key: Zeroizing<Vec<u8>>,
}

impl Asking {
    pub(super) fn new(identity: &SpiffeId, ttl: Duration) -> Result<Self, Fault> {
        let (csr, key) = signing_request(identity)
            .map_err(|error| ("signing_failed", format!("no request can be made: {error}")))?;
        Ok(Self {
            csr,
            identity: identity.to_string(),
            seconds: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
            key,
        })
    }

    /// The call, with the token as it is at this moment.
    pub(super) fn request(
        &self,
        token: &Path,
        cluster: &str,
    ) -> Result<Request<IstioCertificateRequest>, String> {
        let identity = Value {
            kind: Some(Kind::StringValue(self.identity.clone())),
        };
        let mut request = Request::new(IstioCertificateRequest {
            csr: self.csr.clone(),
            validity_duration: self.seconds,
            metadata: Some(Struct {
                fields: [(IMPERSONATED.to_owned(), identity)].into(),
            }),
        });
        let header = |value: &str| -> Result<AsciiMetadataValue, String> {
            MetadataValue::try_from(value).map_err(|_| "it cannot be sent as a header".to_owned())
        };
        let mut bearer = header(&bearer(token)?)
            .map_err(|error| format!("the token in {}: {error}", token.display()))?;
        bearer.set_sensitive(true);
        request.metadata_mut().insert("authorization", bearer);
        request.metadata_mut().insert("clusterid", header(cluster)?);
        Ok(request)
    }
}

/// Whether a text can be the value of a header.
pub(super) fn is_header(text: &str) -> bool {
    AsciiMetadataValue::try_from(text).is_ok()
}

/// The identity is the only name in it, for authorities that look there.
fn signing_request(identity: &SpiffeId) -> Result<(String, Zeroizing<Vec<u8>>), rcgen::Error> {
    let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    let csr = params.serialize_request(&pair).and_then(|csr| csr.pem());
    let key = Zeroizing::new(pair.serialize_der());
    pair.zeroize();
    Ok((csr?, key))
}

fn bearer(file: &Path) -> Result<Zeroizing<String>, String> {
    let mut token = Zeroizing::new(String::new());
    let read = File::open(file).and_then(|file| file.take(TOKEN_MOST).read_to_string(&mut token));
    read.map_err(|error| format!("the token cannot be read from {}: {error}", file.display()))?;
    match token.trim() {
        "" => Err(format!("the token file {} is empty", file.display())),
        token => Ok(Zeroizing::new(format!("Bearer {token}"))),
    }
}
