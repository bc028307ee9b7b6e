//! `ambit`: the operator's command line. See the library for what it does.

mod tokens;

use std::error::Error;
use std::process::ExitCode;

use ambit::ca::{self, CaArguments, CaConfig};
use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use tokens::{KeyArguments, TokenArguments};

/// The command line cannot be used (`EX_USAGE`, sysexits.h).
const USAGE: u8 = 64;
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
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nobody to tell if even the terminal is gone.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(USAGE),
            };
        }
    };
    match arguments.command {
        Command::Ca(arguments) => match CaConfig::from_arguments(*arguments) {
            Ok(config) => outcome(ca::run(&config)),
            Err(errors) => {
                eprint!("{errors}");
                ExitCode::from(USAGE)
            }
        },
        Command::CaKey(arguments) => outcome(arguments.run()),
        Command::CaToken(arguments) => outcome(arguments.run()),
    }
}

fn outcome(outcome: Result<(), impl Error>) -> ExitCode {
    let Err(error) = outcome else {
        return ExitCode::SUCCESS;
    };
    eprint!("ambit: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprint!(": {error}");
        cause = error.source();
    }
    eprintln!();
    ExitCode::from(FAILURE)
}
