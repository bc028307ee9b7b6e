//! External programs: finding and running them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt;

/// `ip` and `nft` take milliseconds. One that takes longer is blocked on a kernel lock.
const TOOL_TIMEOUT: Duration = Duration::from_secs(10);

/// Checks for root and for the programs that every lab needs.
pub(crate) fn check() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the lab needs root: it creates network namespaces");
    }
    for (tool, package) in [("ip", "iproute2"), ("nft", "nftables")] {
        require(tool, package)?;
    }
    if !Path::new("/etc/hosts").exists() {
        bail!("/etc/hosts is missing: `ip netns exec` cannot mount a pod's hosts file over it");
    }
    Ok(())
}

/// Checks that a program is in the path. The error names the package to install.
pub(crate) fn require(tool: &str, package: &str) -> Result<()> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    if std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()) {
        return Ok(());
    }
    bail!("{tool} is missing: apt-get install {package}")
}

/// Finds a binary of this workspace: in `dir`, else in `$AMBIT_BIN_DIR`, else in the target folder
/// of the running executable (a test executable is one level below, in `deps`).
pub(crate) fn binary(name: &str, dir: Option<&Path>) -> Result<PathBuf> {
    let running = std::env::current_exe().context("the path of the running executable")?;
    let configured = dir
        .map(Path::to_owned)
        .or_else(|| std::env::var_os("AMBIT_BIN_DIR").map(PathBuf::from));
    let dirs: Vec<PathBuf> = match configured {
        Some(dir) => vec![dir],
        None => running
            .ancestors()
            .skip(1)
            .take(2)
            .map(Path::to_owned)
            .collect(),
    };
    let found = dirs
        .iter()
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        format!("no {name} in {}: cargo build -p {name}", dirs.join(" or "))
    })
}

/// Runs a tool with this stdin and returns its stdout. Its stderr becomes the error.
pub(crate) fn run(command: &[&str], stdin: &str) -> Result<String> {
    let [program, args @ ..] = command else {
        bail!("no command")
    };
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A tool that rejects its first line closes its stdin; its stderr has the reason.
        let _ = pipe.write_all(stdin.as_bytes());
    }
    stdout_of(command, stdin, child.wait_with_output())
}

/// [`run`], without blocking and with a timeout.
pub(crate) async fn run_async(command: &[&str], stdin: &str) -> Result<String> {
    let [program, args @ ..] = command else {
        bail!("no command")
    };
    let mut child = tokio::process::Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    if let Some(mut pipe) = child.stdin.take() {
        let _ = pipe.write_all(stdin.as_bytes()).await;
    }
    match tokio::time::timeout(TOOL_TIMEOUT, child.wait_with_output()).await {
        Ok(output) => stdout_of(command, stdin, output),
        Err(_) => bail!("{} did not exit within {TOOL_TIMEOUT:?}", command.join(" ")),
    }
}

fn stdout_of(
    command: &[&str],
    stdin: &str,
    output: std::io::Result<std::process::Output>,
) -> Result<String> {
    let output = output.with_context(|| format!("cannot wait for {}", command.join(" ")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned();
    bail!(
        "{}: {stderr} {}",
        command.join(" "),
        stdin.lines().next().unwrap_or_default()
    )
}
