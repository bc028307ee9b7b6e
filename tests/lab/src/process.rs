//! Programs that a test runs inside a pod, a node or the fabric.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::poll;
use crate::protocol::ExecInfo;

/// How a program ended and what it said.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; 128 + signal number if a signal ended it, as a shell says it.
    pub code: i32,
    /// What it wrote to stdout, as text (not UTF-8: replaced).
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Output {
    /// Exit code 0.
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// The stdout of a program that must have succeeded.
    ///
    /// # Errors
    /// It did not; the error carries code and stderr.
    pub fn ok(self) -> Result<String> {
        if self.success() {
            return Ok(self.stdout);
        }
        bail!(
            "exit code {}: {}{}",
            self.code,
            self.stdout.trim_end(),
            self.stderr.trim_end()
        )
    }
}

/// A command that runs in the network namespace (and with the hosts file and environment) of `info`.
pub(crate) fn command(info: &ExecInfo, cmd: &[&str]) -> Command {
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", &info.netns])
        .args(cmd)
        .envs(&info.env);
    if info.dir.is_dir() {
        command.current_dir(&info.dir);
    }
    command
}

/// Bytes that a thread collects from a pipe, and that others wait for.
#[derive(Debug, Default)]
struct Collected {
    bytes: Mutex<(Vec<u8>, bool)>,
    more: Condvar,
}

impl Collected {
    fn pump(self: Arc<Self>, mut pipe: impl Read) {
        let mut buffer = [0; 16 * 1024];
        loop {
            let read = pipe.read(&mut buffer).unwrap_or(0);
            let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            bytes.0.extend_from_slice(&buffer[..read]);
            bytes.1 = read == 0;
            self.more.notify_all();
            if read == 0 {
                return;
            }
        }
    }

    fn so_far(&self) -> Vec<u8> {
        self.bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .0
            .clone()
    }

    /// Waits until `found` holds of the bytes so far; false at the deadline or at the end of the pipe.
    fn wait(&self, deadline: Instant, found: impl Fn(&[u8]) -> bool) -> bool {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if found(&bytes.0) || bytes.1 || left.is_zero() {
                return found(&bytes.0);
            }
            bytes = self
                .more
                .wait_timeout(bytes, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A running program; dropping it kills it and what it started.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Arc<Collected>,
    stderr: Arc<Collected>,
    pumps: Vec<JoinHandle<()>>,
}

impl Process {
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // A group of its own, so that killing it reaches what it started.
        command.process_group(0);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        let (stdout, stderr) = (Arc::<Collected>::default(), Arc::<Collected>::default());
        let mut pumps = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            let collected = Arc::clone(&stdout);
            pumps.push(std::thread::spawn(move || collected.pump(pipe)));
        }
        if let Some(pipe) = child.stderr.take() {
            let collected = Arc::clone(&stderr);
            pumps.push(std::thread::spawn(move || collected.pump(pipe)));
        }
        let stdin = child.stdin.take();
        Ok(Self {
            child,
            stdin,
            stdout,
            stderr,
            pumps,
        })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its stdin.
    ///
    /// # Errors
    /// The pipe is closed.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let stdin = self.stdin.as_mut().context("stdin was closed")?;
        stdin
            .write_all(bytes)
            .and_then(|()| stdin.flush())
            .context("cannot write to the process")
    }

    /// Closes its stdin, which many programs take as the end of their input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// What it wrote to stdout so far.
    pub fn stdout(&self) -> Vec<u8> {
        self.stdout.so_far()
    }

    /// What it wrote to stderr so far.
    pub fn stderr(&self) -> Vec<u8> {
        self.stderr.so_far()
    }

    /// Waits until stdout contains `text`.
    ///
    /// # Errors
    /// It did not say so before the deadline or its end.
    pub fn wait_stdout(&self, text: &str, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        if self
            .stdout
            .wait(deadline, |bytes| contains(bytes, text.as_bytes()))
        {
            return Ok(());
        }
        bail!(
            "not said within {within:?}: {text:?}; stderr: {}",
            lossy(&self.stderr()).trim_end()
        )
    }

    /// Waits until stderr contains `text`.
    ///
    /// # Errors
    /// It did not say so before the deadline or its end.
    pub fn wait_stderr(&self, text: &str, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        if self
            .stderr
            .wait(deadline, |bytes| contains(bytes, text.as_bytes()))
        {
            return Ok(());
        }
        bail!(
            "not said within {within:?}: {text:?}; stderr: {}",
            lossy(&self.stderr()).trim_end()
        )
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to it and to what it started.
    pub fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // It may have exited already, which is what a signal would have been for.
            let _ = killpg(Pid::from_raw(pid), signal);
        }
    }

    /// Waits for its end, with stdin left as it is (see [`Self::close_stdin`]).
    ///
    /// # Errors
    /// It still runs at the deadline; it is killed then.
    pub fn wait(mut self, within: Duration) -> Result<Output> {
        // std has no wait with a deadline.
        let ended = poll::until(within, poll::OFTEN, || self.child.try_wait().transpose());
        match ended {
            Some(status) => Ok(self.collect(status.context("cannot wait for the process")?)),
            None => {
                let said = lossy(&self.stderr());
                bail!(
                    "still running after {within:?}; stderr so far: {}",
                    said.trim_end()
                )
            }
        }
    }

    fn collect(mut self, status: ExitStatus) -> Output {
        // Whatever the program left behind in its group must not keep the pipes open.
        self.signal(Signal::SIGKILL);
        for pump in self.pumps.drain(..) {
            let _ = pump.join();
        }
        Output {
            code: exit_code(status),
            stdout: lossy(&self.stdout()),
            stderr: lossy(&self.stderr()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
        for pump in self.pumps.drain(..) {
            let _ = pump.join();
        }
    }
}

/// As a shell says it: the exit code, or 128 + the signal's number.
pub(crate) fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

pub(crate) fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    needle.is_empty()
        || haystack
            .windows(needle.len())
            .any(|window| window == needle)
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
