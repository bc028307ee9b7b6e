//! Shifts the wall clock of one program with a preloaded library, which is built on first use.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::options::Clock;
use crate::registry::LabDir;
use crate::tools;

const SOURCE: &str = include_str!("../clock.c");

/// The environment variables that give a program this wall clock.
pub(super) fn environment(dir: &LabDir, clock: Clock) -> Result<Vec<(String, String)>> {
    let seconds = match clock {
        Clock::System => return Ok(Vec::new()),
        Clock::Ahead(by) => by.as_secs().to_string(),
        Clock::Behind(by) => format!("-{}", by.as_secs()),
    };
    let library = build_library(&dir.root().join("clock"))?;
    let library = library.to_str().context("the path of the lab")?.to_owned();
    Ok(vec![
        ("LD_PRELOAD".to_owned(), library),
        ("AMBIT_LAB_CLOCK".to_owned(), seconds),
    ])
}

fn build_library(folder: &Path) -> Result<PathBuf> {
    let library = folder.join("clock.so");
    if library.exists() {
        return Ok(library);
    }
    tools::require("cc", "build-essential")?;
    std::fs::create_dir_all(folder).context("the clock's folder")?;
    let built = folder.join("built.so");
    let out = built.to_string_lossy();
    tools::run(
        &["cc", "-shared", "-fPIC", "-O2", "-x", "c", "-o", &out, "-"],
        SOURCE,
    )
    .context("the clock library")?;
    std::fs::rename(&built, &library).context("the clock library")?;
    Ok(library)
}
