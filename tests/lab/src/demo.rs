//! `lab demo`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;

pub(crate) fn run(_manifests: PathBuf, _keep: bool) -> Result<ExitCode> {
    Ok(ExitCode::FAILURE)
}
