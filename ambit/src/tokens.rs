//! `ambit ca-key` and `ambit ca-token`: keys and tokens of a mesh without a Kubernetes API server.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use ambit::ca::{
    Claims, KeyFileError, ServiceAccount, ServiceAccountPatterns, TokenSigner, create_keys,
};
use clap::Args;
use component::flags::duration;

/// Arguments of `ambit ca-key`.
#[derive(Args)]
pub(crate) struct KeyArguments {
    /// File for the private key, which signs tokens; never overwritten
    #[arg(long)]
    private_key: PathBuf,
    /// File for the public key, for `ambit ca --token-key`; never overwritten
    #[arg(long)]
    public_key: PathBuf,
}

/// Arguments of `ambit ca-token`.
#[derive(Args)]
pub(crate) struct TokenArguments {
    /// File with the private key
    #[arg(long)]
    key: PathBuf,
    /// Namespace of the caller's service account
    #[arg(long, default_value = "istio-system")]
    namespace: String,
    /// Name of the caller's service account
    #[arg(long, default_value = "ztunnel")]
    service_account: String,
    /// Other service accounts that the caller may impersonate, separated by commas:
    /// namespace/name, namespace/* or */*
    #[arg(long, value_delimiter = ',')]
    impersonate: Vec<String>,
    /// Audience of the token
    #[arg(long, default_value = "istio-ca")]
    audience: String,
    /// Lifetime of the token
    #[arg(long, default_value = "1h", value_parser = ttl)]
    ttl: Duration,
}

/// Why no token was created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("cannot load the key that signs tokens")]
    Key(#[from] KeyFileError),
    #[error("{0:?} is not the name of a service account")]
    Account(String),
    #[error("{0:?} is neither namespace/name, namespace/* nor */*")]
    Pattern(String),
    #[error("cannot sign the token")]
    Signing(#[source] jsonwebtoken::errors::Error),
    #[error("cannot print the token")]
    Output(#[source] io::Error),
}

fn ttl(text: &str) -> Result<Duration, String> {
    duration(text, Duration::from_secs(1))
}

impl KeyArguments {
    pub(crate) fn run(self) -> Result<(), KeyFileError> {
        create_keys(&self.private_key, &self.public_key)
    }
}

impl TokenArguments {
    pub(crate) fn run(self) -> Result<(), TokenError> {
        let signer = TokenSigner::open(&self.key)?;
        let account =
            ServiceAccount::new(&self.namespace, &self.service_account).ok_or_else(|| {
                TokenError::Account(format!("{}/{}", self.namespace, self.service_account))
            })?;
        ServiceAccountPatterns::parse(&self.impersonate).map_err(TokenError::Pattern)?;
        let claims = Claims::new(&account, &self.audience, self.ttl, self.impersonate);
        let token = signer.sign(&claims).map_err(TokenError::Signing)?;
        // Istio's clients send the content of a token file unchanged, and a header cannot contain a
        // line feed.
        let end = if io::stdout().is_terminal() { "\n" } else { "" };
        write!(io::stdout(), "{token}{end}").map_err(TokenError::Output)
    }
}
