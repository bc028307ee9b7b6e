//! The commands around tokens: for meshes without a Kubernetes API server that gives them out.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use ambit::ca::{Account, Accounts, Claims, KeyFileError, TokenKey, create_keys};
use clap::Args;
use component::flags::duration;

/// Arguments of `ambit ca-key`.
#[derive(Args)]
pub(crate) struct KeyArguments {
    /// File for the key that signs; never overwritten
    #[arg(long)]
    private_key: PathBuf,
    /// File for the key that checks, for `ambit ca --token-key`; never overwritten
    #[arg(long)]
    public_key: PathBuf,
}

/// Arguments of `ambit ca-token`.
#[derive(Args)]
pub(crate) struct TokenArguments {
    /// File with the key that signs
    #[arg(long)]
    key: PathBuf,
    /// Namespace of the caller's service account
    #[arg(long, default_value = "istio-system")]
    namespace: String,
    /// Name of the caller's service account
    #[arg(long, default_value = "ztunnel")]
    service_account: String,
    /// For whom the caller may ask beside itself, separated by commas: namespace/name, namespace/*
    /// or */*
    #[arg(long, value_delimiter = ',')]
    impersonate: Vec<String>,
    /// For whom the token is meant
    #[arg(long, default_value = "istio-ca")]
    audience: String,
    /// How long it holds
    #[arg(long, default_value = "1h", value_parser = ttl)]
    ttl: Duration,
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenError {
    #[error("no token can be signed")]
    Key(#[from] KeyFileError),
    #[error("{0:?} is no name of a service account")]
    Account(String),
    #[error("{0:?} is none of namespace/name, namespace/* and */*")]
    Pattern(String),
    #[error("the token cannot be signed")]
    Signing(#[source] jsonwebtoken::errors::Error),
    #[error("the token cannot be printed")]
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
        let key = TokenKey::open(&self.key)?;
        let account = Account::new(&self.namespace, &self.service_account).ok_or_else(|| {
            TokenError::Account(format!("{}/{}", self.namespace, self.service_account))
        })?;
        Accounts::parse(&self.impersonate).map_err(TokenError::Pattern)?;
        let claims = Claims::new(&account, &self.audience, self.ttl, self.impersonate);
        let token = key.sign(&claims).map_err(TokenError::Signing)?;
        // Istio's clients send a token file as it is, and a line's end cannot be sent.
        let end = if io::stdout().is_terminal() { "\n" } else { "" };
        write!(io::stdout(), "{token}{end}").map_err(TokenError::Output)
    }
}
