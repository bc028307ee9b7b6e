//! SPIRE's programs, as `tests/setup.sh spire` installs them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Which SPIRE; `tests/setup.sh` builds the same.
const VERSION: &str = "1.13.3";

/// A program that runs until this is dropped.
#[derive(Debug)]
pub(super) struct Program(Child);

impl Program {
    pub(super) fn start(name: &str, config: &Path) -> Result<Self> {
        // It must not outlive a test that is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(program(name)?);
        command.arg("run").arg("-config").arg(config);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().map(Self).with_context(|| name.to_owned())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already, and then there is nothing to do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs one command of a program; what it printed.
pub(super) fn run(name: &str, words: &[&str]) -> Result<String> {
    let output = Command::new(program(name)?).args(words).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{name} {}: {said}",
        words.join(" ")
    );
    String::from_utf8(output.stdout).context("what it printed")
}

fn program(name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os("AMBIT_SPIRE_DIR").map(PathBuf::from);
    let cache = || {
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"));
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        Some(cache.or_else(home)?.join(format!("ambit/spire-{VERSION}")))
    };
    let folder = folder
        .or_else(cache)
        .context("no HOME to look for SPIRE in")?;
    let path = folder.join(name);
    ensure!(
        path.is_file(),
        "no {}: tests/setup.sh spire",
        path.display()
    );
    Ok(path)
}
