//! The `lab` command: a Kubernetes cluster of network namespaces. See the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    lab::cli::main()
}
