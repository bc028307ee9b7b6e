//! `ambit`: the operator's command line. See the library for what it does.

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "ambit", version, about = "The command line of the Ambit mesh")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the certificate authority
    Ca,
    /// Sign a token by which a node may ask the certificate authority
    CaToken,
}

fn main() {
    match Arguments::parse().command {
        Command::Ca | Command::CaToken => {}
    }
}
