//! Programs that a test runs in a pod, a node or the fabric.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::poll;
use crate::protocol::ExecInfo;

/// The exit code and output of a program.
#[derive(Debug, Clone)]
pub struct Output {
    /// The exit code; 128 + signal number if a signal ended the program, as in a shell.
    pub code: i32,
    /// Its stdout as text; invalid UTF-8 is replaced.
    pub stdout: String,
    /// Its stderr as text.
    pub stderr: String,
}

impl Output {
    /// Whether the exit code is 0.
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// The stdout of a program that must have succeeded.
    ///
    /// # Errors
    /// The exit code is not 0; the error has the code, stdout and stderr.
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

/// A command in the network namespace of `info`, with its hosts file, environment and folder.
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

/// Bytes that a thread reads from a pipe and other threads wait for.
#[derive(Debug, Default)]
struct PipeBuffer {
    state: Mutex<PipeState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct PipeState {
    bytes: Vec<u8>,
    is_closed: bool,
}

impl PipeBuffer {
    fn read_from(self: Arc<Self>, mut pipe: impl Read) {
        let mut buffer = [0; 16 * 1024];
        loop {
            let read = pipe.read(&mut buffer).unwrap_or(0);
            let mut state = self.lock();
            state.bytes.extend_from_slice(&buffer[..read]);
            state.is_closed = read == 0;
            self.changed.notify_all();
            if read == 0 {
                return;
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// Waits until `found` is true of the bytes so far. False at the deadline or at the end of the
    /// pipe.
    fn wait(&self, deadline: Instant, found: impl Fn(&[u8]) -> bool) -> bool {
        let mut state = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if found(&state.bytes) || state.is_closed || left.is_zero() {
                return found(&state.bytes);
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, PipeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running program. Dropping it kills the program and its children.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Arc<PipeBuffer>,
    stderr: Arc<PipeBuffer>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // A process group of its own, so that a signal reaches the children too.
        command.process_group(0);
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        let (stdout, stderr) = (Arc::<PipeBuffer>::default(), Arc::<PipeBuffer>::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            let buffer = Arc::clone(&stdout);
            readers.push(std::thread::spawn(move || buffer.read_from(pipe)));
        }
        if let Some(pipe) = child.stderr.take() {
            let buffer = Arc::clone(&stderr);
            readers.push(std::thread::spawn(move || buffer.read_from(pipe)));
        }
        let stdin = child.stdin.take();
        Ok(Self {
            child,
            stdin,
            stdout,
            stderr,
            readers,
        })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes to the program's stdin.
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

    /// Closes the program's stdin, which most programs treat as end of input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// The stdout so far.
    pub fn stdout(&self) -> Vec<u8> {
        self.stdout.bytes()
    }

    /// The stderr so far.
    pub fn stderr(&self) -> Vec<u8> {
        self.stderr.bytes()
    }

    /// Waits until stdout contains `text`.
    ///
    /// # Errors
    /// stdout does not contain it at the timeout or when the pipe is closed.
    pub fn wait_stdout(&self, text: &str, timeout: Duration) -> Result<()> {
        self.wait_text(&self.stdout, text, timeout)
    }

    /// Waits until stderr contains `text`.
    ///
    /// # Errors
    /// stderr does not contain it at the timeout or when the pipe is closed.
    pub fn wait_stderr(&self, text: &str, timeout: Duration) -> Result<()> {
        self.wait_text(&self.stderr, text, timeout)
    }

    fn wait_text(&self, pipe: &PipeBuffer, text: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        if pipe.wait(deadline, |bytes| contains(bytes, text.as_bytes())) {
            return Ok(());
        }
        bail!(
            "no {text:?} in the output within {timeout:?}; stderr: {}",
            lossy(&self.stderr()).trim_end()
        )
    }

    /// Whether the program still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to the program and its children.
    pub fn signal(&self, signal: Signal) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // An error means that the program has exited already.
            let _ = killpg(Pid::from_raw(pid), signal);
        }
    }

    /// Waits for the program's exit. stdin stays open (see [`Self::close_stdin`]).
    ///
    /// # Errors
    /// The program still runs at the timeout; it is killed.
    pub fn wait(mut self, timeout: Duration) -> Result<Output> {
        // std has no wait with a timeout.
        let exited = poll::until(timeout, poll::FAST_INTERVAL, || {
            self.child.try_wait().transpose()
        });
        match exited {
            Some(status) => Ok(self.collect(status.context("cannot wait for the process")?)),
            None => {
                let stderr = lossy(&self.stderr());
                bail!(
                    "still running after {timeout:?}; stderr so far: {}",
                    stderr.trim_end()
                )
            }
        }
    }

    fn collect(mut self, status: ExitStatus) -> Output {
        // Children that still run must not keep the pipes open.
        self.signal(Signal::SIGKILL);
        for reader in self.readers.drain(..) {
            let _ = reader.join();
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
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

/// The exit code, or 128 + signal number, as in a shell.
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
