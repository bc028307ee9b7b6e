//! The `ztunnel` program: command line, log, runtime and exit code. The library is the daemon.

use std::error::Error;
use std::process::ExitCode;

use component::{ErrorChain, flags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tikv_jemallocator::Jemalloc;
use ztunnel::config::{Arguments, Config};
use ztunnel::daemon;
use ztunnel::telemetry::Log;

/// Returns memory to the system after a burst of connections, and has no lock between threads. With mimalloc 2, which
/// compiles faster, an idle daemon has 48 MiB of resident memory, and twice that after a burst.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// The daemon could not start, or had to stop because of an error.
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
    // Dropped last: waits until the log is written.
    let (log, _flush_on_drop) = Log::install(&config.log)?;
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = tokio::task::LocalSet::new().block_on(&runtime, daemon::run(config, log));
    outcome.inspect_err(|error| tracing::error!(error = error as &dyn Error, "stopping"))?;
    Ok(())
}

/// Raises the soft limit of open files to the hard one. A connection takes two descriptors and a
/// pod a dozen; the usual soft limit of 1024 exists for programs that use `select`.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files above its soft value");
    }
}
