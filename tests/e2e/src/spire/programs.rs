//! Runs SPIRE's programs, which `tests/setup.sh spire` installs.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

/// The SPIRE version that `tests/setup.sh` builds.
const VERSION: &str = "1.13.3";

/// A running program. Dropping the value kills it.
#[derive(Debug)]
pub(super) struct Program(Child);

impl Program {
    pub(super) fn start(name: &str, config: &Path) -> Result<Self> {
        // The kernel kills it if the test process is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(program(name)?);
        command.arg("run").arg("-config").arg(config);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().map(Self).with_context(|| name.to_owned())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Fails if the program has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs one command of a program and returns its stdout.
pub(super) fn run(name: &str, words: &[&str]) -> Result<String> {
    let output = Command::new(program(name)?).args(words).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{name} {}: {stderr}",
        words.join(" ")
    );
    String::from_utf8(output.stdout).context("stdout is not UTF-8")
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
        .context("HOME is not set, so SPIRE cannot be found")?;
    let path = folder.join(name);
    ensure!(
        path.is_file(),
        "no {}: run tests/setup.sh spire",
        path.display()
    );
    Ok(path)
}
