//! `ambit`: the operator's command line. See the library for what it does.

mod tokens;

use std::error::Error;
use std::process::ExitCode;

use ambit::ca::{self, CaArguments, CaConfig};
use clap::{Parser, Subcommand};
use component::{ErrorChain, flags};
use tokens::{KeyArguments, TokenArguments};

/// The command could not do what it was asked.
const FAILURE: u8 = 1;

/// The command line of the Ambit mesh
#[derive(Parser)]
#[command(name = "ambit", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the certificate authority: sign certificates for callers who prove by a token for whom
    /// they may ask, in Istio's protocol
    Ca(Box<CaArguments>),
    /// Make a pair of keys: one to sign tokens with, one for the authority to check them
    CaKey(KeyArguments),
    /// Sign a token by which a node may ask the certificate authority, and print it
    CaToken(TokenArguments),
}

fn main() -> ExitCode {
    let arguments: Arguments = match flags::parse_arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    match arguments.command {
        Command::Ca(arguments) => match CaConfig::from_arguments(*arguments) {
            Ok(config) => outcome(ca::run(&config)),
            Err(errors) => {
                eprint!("{errors}");
                ExitCode::from(flags::EXIT_USAGE)
            }
        },
        Command::CaKey(arguments) => outcome(arguments.run()),
        Command::CaToken(arguments) => outcome(arguments.run()),
    }
}

fn outcome(outcome: Result<(), impl Error + 'static>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ambit: {}", ErrorChain(&error));
            ExitCode::from(FAILURE)
        }
    }
}
