//! `ztunnel`: the node daemon. See the library for what it does.

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use mimalloc::MiMalloc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ztunnel::config::{Arguments, Config};
use ztunnel::daemon;
use ztunnel::telemetry::{Chain, Log};

/// Returns memory to the system after a burst of connections, and has no lock between threads.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// The command line cannot be used (`EX_USAGE`, sysexits.h).
const USAGE: u8 = 64;
/// The daemon could not start, or could not go on.
const FAILURE: u8 = 1;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nobody to tell if even the terminal is gone.
            let _ = error.print();
            let asked_for = matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            );
            return if asked_for {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(USAGE)
            };
        }
    };
    let config = match Config::from_arguments(arguments) {
        Ok(config) => config,
        Err(errors) => {
            eprint!("{errors}");
            return ExitCode::from(USAGE);
        }
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ztunnel: {}", Chain(&*error));
            ExitCode::from(FAILURE)
        }
    }
}

fn run(config: Config) -> Result<(), Box<dyn Error>> {
    let (log, _written) = Log::install(&config.log)?;
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = tokio::task::LocalSet::new().block_on(&runtime, daemon::run(config, log));
    outcome.inspect_err(|error| tracing::error!(error = error as &dyn Error, "stopping"))?;
    Ok(())
}

/// Every connection takes two descriptors and every pod a dozen; the soft limit of 1024 is for
/// programs that use `select`.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays at its soft value");
    }
}
