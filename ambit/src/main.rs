//! The binary `ambit`: parses the command line and calls the library.

mod tokens;

use std::error::Error;
use std::process::ExitCode;

use ambit::ca::{self, CaArguments, CaConfig};
use clap::{Parser, Subcommand};
use component::{ErrorChain, flags};
use tokens::{KeyArguments, TokenArguments};

/// Exit code of a command that failed.
const EXIT_FAILURE: u8 = 1;

/// The command line of the Ambit mesh
#[derive(Parser)]
#[command(name = "ambit", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the certificate authority: issue certificates in Istio's protocol, to callers that
    /// authenticate with a token
    Ca(Box<CaArguments>),
    /// Create a key pair: a private key that signs tokens, and a public key with which the
    /// authority verifies them
    CaKey(KeyArguments),
    /// Sign a token with which a node calls the certificate authority, and print it
    CaToken(TokenArguments),
}

fn main() -> ExitCode {
    let arguments: Arguments = match flags::parse_arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    match arguments.command {
        Command::Ca(arguments) => match CaConfig::from_arguments(*arguments) {
            Ok(config) => exit_code(ca::run(&config)),
            Err(errors) => {
                eprint!("{errors}");
                ExitCode::from(flags::EXIT_USAGE)
            }
        },
        Command::CaKey(arguments) => exit_code(arguments.run()),
        Command::CaToken(arguments) => exit_code(arguments.run()),
    }
}

fn exit_code(outcome: Result<(), impl Error + 'static>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ambit: {}", ErrorChain(&error));
            ExitCode::from(EXIT_FAILURE)
        }
    }
}
