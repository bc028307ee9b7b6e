//! `ztunnel`: the node daemon. See the library for what it does.

use std::error::Error;
use std::process::ExitCode;

use component::{ErrorChain, flags};
use mimalloc::MiMalloc;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use ztunnel::config::{Arguments, Config};
use ztunnel::daemon;
use ztunnel::telemetry::Log;

/// Returns memory to the system after a burst of connections, and has no lock between threads.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// The daemon could not start, or could not go on.
const FAILURE: u8 = 1;

fn main() -> ExitCode {
    let arguments: Arguments = match flags::parse_arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let config = match Config::from_arguments(arguments) {
        Ok(config) => config,
        Err(errors) => {
            eprint!("{errors}");
            return ExitCode::from(flags::EXIT_USAGE);
        }
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ztunnel: {}", ErrorChain(&*error));
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
