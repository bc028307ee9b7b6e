//! Signed tokens: the authentication of a mesh without a Kubernetes API server.
//!
//! A token is a JWT, signed with ES256 by whoever holds the private key; the authority has the
//! public one. Its claims are those of a service account's token, and one more:
//!
//! | claim | meaning |
//! |---|---|
//! | `sub` | `system:serviceaccount:<namespace>:<name>` of the caller |
//! | `aud` | must name this authority, `istio-ca` |
//! | `exp`, `nbf` | when it holds; `exp` is required |
//! | `impersonate` | for whom the caller may ask: `namespace/name`, `namespace/*`, `*/*` |

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

use super::account::{Account, Accounts};
use super::authenticate::{Authenticating, Authenticator, Caller, Unauthenticated};

pub use keys::{KeyFileError, create_keys};

/// Clocks of the nodes and of the authority differ by as much without anybody noticing.
const LEEWAY: Duration = Duration::from_secs(10);
/// Those of Kubernetes have one or two thousand bytes; a signature is checked over all of it.
const TOKEN_MOST: usize = 16 * 1024;

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Whose it is.
    pub sub: String,
    /// For whom it is meant.
    #[serde(skip_deserializing)]
    pub aud: Vec<String>,
    /// Until when it holds, in seconds since 1970.
    #[serde(skip_deserializing)]
    pub exp: u64,
    /// For whom its holder may ask.
    #[serde(default)]
    pub impersonate: Vec<String>,
}

impl Claims {
    /// The claims of a token for `account`, that holds for `ttl` from now.
    pub fn new(account: &Account, audience: &str, ttl: Duration, impersonate: Vec<String>) -> Self {
        let end = SystemTime::now() + ttl;
        let exp = end.duration_since(SystemTime::UNIX_EPOCH);
        Self {
            sub: account.subject(),
            aud: vec![audience.to_owned()],
            exp: exp.unwrap_or_default().as_secs(),
            impersonate,
        }
    }
}

/// Signs tokens.
pub struct TokenKey(EncodingKey);

impl TokenKey {
    /// Reads a private key, PKCS#8 in PEM, that nobody but its owner may read.
    ///
    /// # Errors
    /// Fails if the file cannot be read, is open to others, or holds no such key.
    pub fn open(file: &Path) -> Result<Self, KeyFileError> {
        let pkcs8 = keys::private(file)?;
        Ok(Self(EncodingKey::from_ec_der(&pkcs8)))
    }

    /// Signs a token with these claims.
    ///
    /// # Errors
    /// Fails if the key is not one of P-256.
    pub fn sign(&self, claims: &impl Serialize) -> Result<String, jsonwebtoken::errors::Error> {
        encode(&Header::new(Algorithm::ES256), claims, &self.0)
    }
}

/// Recognises callers by tokens that were signed with a key whose public half is in a file. Several
/// keys may be in it, so that one can replace another.
pub struct SignedTokens {
    file: PathBuf,
    keys: ArcSwap<Vec<DecodingKey>>,
    validation: Validation,
}

impl SignedTokens {
    /// Reads the public keys, PEM.
    ///
    /// # Errors
    /// Fails if the file cannot be read, or holds anything but public keys of P-256.
    pub fn open(file: &Path, audience: &str) -> Result<Self, KeyFileError> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.leeway = LEEWAY.as_secs();
        validation.validate_nbf = true;
        validation.set_audience(&[audience]);
        validation.set_required_spec_claims(&["exp", "aud", "sub"]);
        Ok(Self {
            file: file.to_owned(),
            keys: ArcSwap::from_pointee(keys::public(file)?),
            validation,
        })
    }

    /// Reads the file again. What was good stays if it cannot be used.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn look(&self) -> Result<(), KeyFileError> {
        self.keys.store(Arc::new(keys::public(&self.file)?));
        Ok(())
    }

    fn recognise(&self, token: Option<&str>) -> Result<Caller, Unauthenticated> {
        let token = token.ok_or_else(|| {
            Unauthenticated::new("no_token", "a bearer token is needed, and none came")
        })?;
        if token.len() > TOKEN_MOST {
            return Err(Unauthenticated::new(
                "token_malformed",
                "the token is too long",
            ));
        }
        let claims = self.claims(token)?;
        let account = Account::from_subject(&claims.sub).ok_or_else(|| {
            let message = "the token's sub is not system:serviceaccount:<namespace>:<name>";
            Unauthenticated::new("token_claims", message)
        })?;
        let may_speak_for = Accounts::parse(&claims.impersonate).map_err(|_| {
            let message = "the token's impersonate holds more than namespace/name and namespace/*";
            Unauthenticated::new("token_claims", message)
        })?;
        Ok(Caller {
            account,
            may_speak_for,
        })
    }

    /// Checked against each key; of several complaints the one of the key that signed it counts.
    fn claims(&self, token: &str) -> Result<Claims, Unauthenticated> {
        decode_header(token).map_err(|_| complained(&ErrorKind::InvalidToken))?;
        let mut complaint = ErrorKind::InvalidSignature;
        for key in self.keys.load().iter() {
            match decode::<Claims>(token, key, &self.validation) {
                Ok(decoded) => return Ok(decoded.claims),
                Err(error) => match error.kind() {
                    ErrorKind::InvalidSignature => {}
                    other => complaint = other.clone(),
                },
            }
        }
        Err(complained(&complaint))
    }
}

fn complained(error: &ErrorKind) -> Unauthenticated {
    let (reason, message) = match error {
        ErrorKind::InvalidSignature => (
            "token_signature",
            "the token was not signed with a key that is known here",
        ),
        ErrorKind::ExpiredSignature => ("token_expired", "the token has expired"),
        ErrorKind::ImmatureSignature => ("token_not_yet_valid", "the token is not valid yet"),
        ErrorKind::InvalidAudience => ("token_audience", "the token is meant for somebody else"),
        ErrorKind::MissingRequiredClaim(_)
        | ErrorKind::InvalidClaimFormat(_)
        | ErrorKind::Json(_) => (
            "token_claims",
            "the token lacks one of sub, aud and exp, or has another form",
        ),
        _ => ("token_malformed", "the token is no JWT of ES256"),
    };
    Unauthenticated::new(reason, message)
}

impl Authenticator for SignedTokens {
    fn authenticate<'a>(&'a self, token: Option<&'a str>) -> Authenticating<'a> {
        Box::pin(std::future::ready(self.recognise(token)))
    }
}

#[cfg(test)]
mod tests;
