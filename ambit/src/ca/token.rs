//! Signed tokens: authentication in a mesh without a Kubernetes API server.
//!
//! A token is a JWT signed with ES256. The operator has the private key, the authority the public
//! one. The claims are those of a service account's token, and one more:
//!
//! | claim | meaning |
//! |---|---|
//! | `sub` | `system:serviceaccount:<namespace>:<name>` of the caller |
//! | `aud` | must name this authority, `istio-ca` |
//! | `exp`, `nbf` | when it is valid; `exp` is required |
//! | `impersonate` | accounts that the caller may request: `namespace/name`, `namespace/*`, `*/*` |

mod keys;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode,
};
use serde::{Deserialize, Serialize};

use super::authentication::{Authenticating, Authenticator, Caller};
use super::refusal::Refusal;
use super::service_account::{ServiceAccount, ServiceAccountPatterns};

pub use keys::{KeyFileError, create_keys};

/// Tolerated difference between the clocks of the nodes and of the authority.
const LEEWAY: Duration = Duration::from_secs(10);
/// Tokens of Kubernetes have one or two thousand bytes. The signature is verified over all bytes.
const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// The claims of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// The subject: the caller's service account.
    pub sub: String,
    /// The audience.
    #[serde(skip_deserializing)]
    pub aud: Vec<String>,
    /// The expiry, in seconds since 1970.
    #[serde(skip_deserializing)]
    pub exp: u64,
    /// Accounts that the caller may request certificates for.
    #[serde(default)]
    pub impersonate: Vec<String>,
}

impl Claims {
    /// The claims of a token for `account` that is valid for `ttl` from now.
    pub fn new(
        account: &ServiceAccount,
        audience: &str,
        ttl: Duration,
        impersonate: Vec<String>,
    ) -> Self {
        let expiry = SystemTime::now() + ttl;
        let exp = expiry.duration_since(SystemTime::UNIX_EPOCH);
        Self {
            sub: account.subject(),
            aud: vec![audience.to_owned()],
            exp: exp.unwrap_or_default().as_secs(),
            impersonate,
        }
    }
}

/// Signs tokens.
pub struct TokenSigner(EncodingKey);

impl TokenSigner {
    /// Reads a private key, PKCS#8 in PEM, from a file that only its owner can read.
    ///
    /// # Errors
    /// Fails if the file cannot be read, can be read by others, or has no such key.
    pub fn open(file: &Path) -> Result<Self, KeyFileError> {
        let pkcs8 = keys::read_private(file)?;
        Ok(Self(EncodingKey::from_ec_der(&pkcs8)))
    }

    /// Signs a token with these claims.
    ///
    /// # Errors
    /// Fails if the key is not a P-256 key.
    pub fn sign(&self, claims: &impl Serialize) -> Result<String, jsonwebtoken::errors::Error> {
        encode(&Header::new(Algorithm::ES256), claims, &self.0)
    }
}

/// Authenticates callers by signed tokens. The file may have several public keys, so that one can
/// replace another.
pub struct TokenAuthenticator {
    file: PathBuf,
    keys: ArcSwap<Vec<DecodingKey>>,
    validation: Validation,
}

impl TokenAuthenticator {
    /// Reads the public keys, PEM.
    ///
    /// # Errors
    /// Fails if the file cannot be read or has anything but public keys of P-256.
    pub fn open(file: &Path, audience: &str) -> Result<Self, KeyFileError> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.leeway = LEEWAY.as_secs();
        validation.validate_nbf = true;
        validation.set_audience(&[audience]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        Ok(Self {
            file: file.to_owned(),
            keys: ArcSwap::from_pointee(keys::read_public(file)?),
            validation,
        })
    }

    /// Reads the file again. On an error the previous keys stay in use.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn reload(&self) -> Result<(), KeyFileError> {
        self.keys.store(Arc::new(keys::read_public(&self.file)?));
        Ok(())
    }

    fn verify(&self, token: Option<&str>) -> Result<Caller, Refusal> {
        let token = token.ok_or_else(|| {
            Refusal::unauthenticated("no_token", "the request has no bearer token")
        })?;
        if token.len() > MAX_TOKEN_BYTES {
            let message = "the token is too long";
            return Err(Refusal::unauthenticated("token_malformed", message));
        }
        let claims = self.verified_claims(token)?;
        let account = ServiceAccount::from_subject(&claims.sub).ok_or_else(|| {
            let message = "the token's sub is not system:serviceaccount:<namespace>:<name>";
            Refusal::unauthenticated("token_claims", message)
        })?;
        let may_impersonate = ServiceAccountPatterns::parse(&claims.impersonate).map_err(|_| {
            let message = "the token's impersonate has other values than namespace/name, \
                               namespace/* and */*";
            Refusal::unauthenticated("token_claims", message)
        })?;
        Ok(Caller {
            account,
            may_impersonate,
        })
    }

    /// Verifies the token with each key. On failure, an error of the key that signed it has
    /// precedence over an invalid signature.
    fn verified_claims(&self, token: &str) -> Result<Claims, Refusal> {
        decode_header(token).map_err(|_| refusal(&ErrorKind::InvalidToken))?;
        let mut failure = ErrorKind::InvalidSignature;
        for key in self.keys.load().iter() {
            match decode::<Claims>(token, key, &self.validation) {
                Ok(decoded) => return Ok(decoded.claims),
                Err(error) => match error.kind() {
                    ErrorKind::InvalidSignature => {}
                    other => failure = other.clone(),
                },
            }
        }
        Err(refusal(&failure))
    }
}

impl Authenticator for TokenAuthenticator {
    fn authenticate<'a>(&'a self, token: Option<&'a str>) -> Authenticating<'a> {
        Box::pin(std::future::ready(self.verify(token)))
    }
}

fn refusal(error: &ErrorKind) -> Refusal {
    let (reason, message) = match error {
        ErrorKind::InvalidSignature => (
            "token_signature",
            "the token is not signed with a key of this authority",
        ),
        ErrorKind::ExpiredSignature => ("token_expired", "the token has expired"),
        ErrorKind::ImmatureSignature => ("token_not_yet_valid", "the token is not valid yet"),
        ErrorKind::InvalidAudience => ("token_audience", "the token is for another audience"),
        ErrorKind::MissingRequiredClaim(_)
        | ErrorKind::InvalidClaimFormat(_)
        | ErrorKind::Json(_) => (
            "token_claims",
            "one of sub, aud and exp is missing from the token or malformed",
        ),
        _ => ("token_malformed", "the token is not a JWT with ES256"),
    };
    Refusal::unauthenticated(reason, message)
}

#[cfg(test)]
mod tests;
