//! TCP connections that a client pod keeps open to a server that greets and echoes.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Output, Process};

use crate::programs::{PORT, words};

/// An answer takes milliseconds; dozens of connections on a busy machine take seconds.
const DEADLINE: Duration = Duration::from_secs(15);

/// Opens connections one after the other and prints each greeting, then `all open`. Every line on stdin is sent on each
/// connection, and its echo is printed.
const SCRIPT: &str = "for i in $(seq \"$2\"); do exec {fd}<>\"/dev/tcp/$0/$1\" || exit 9; \
                      fds+=($fd); read -r line <&$fd || exit 8; echo \"$line\"; done; echo all open; \
                      while read -r word; do for fd in \"${fds[@]}\"; do echo \"$word\" >&$fd; \
                      read -r line <&$fd || exit 7; echo \"$line\"; done; done";

/// The line that [`SCRIPT`] prints after the last greeting.
const ALL_OPEN: &str = "all open";

/// Connections of one client program. Dropping the value kills the program, which resets them.
#[derive(Debug)]
pub struct OpenConnections {
    process: Process,
    /// The greeting received on each connection.
    pub greetings: Vec<String>,
}

impl OpenConnections {
    /// Opens `count` connections from a pod to [`PORT`] of an address, one after the other.
    ///
    /// # Errors
    /// A connection was refused, or not greeted within 15 s.
    pub fn open(lab: &Lab, pod: &str, to: IpAddr, count: usize) -> Result<Self> {
        let (ip, port, number) = (to.to_string(), PORT.to_string(), count.to_string());
        let command = words(&["bash", "-c", SCRIPT, &ip, &port, &number]);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let process = lab.spawn(pod, &command)?;
        process
            .wait_stdout(&format!("{ALL_OPEN}\n"), DEADLINE)
            .with_context(|| format!("{pod} to {to}"))?;
        let stdout = String::from_utf8_lossy(&process.stdout()).into_owned();
        let greetings: Vec<String> = stdout
            .lines()
            .take_while(|line| *line != ALL_OPEN)
            .map(str::to_owned)
            .collect();
        ensure!(
            greetings.len() == count,
            "expected {count} greetings, got {greetings:?}"
        );
        Ok(Self { process, greetings })
    }

    /// Sends a word on every connection and waits for all echoes.
    ///
    /// # Errors
    /// An echo is missing after 15 s, or differs from the word.
    pub fn echo(&mut self, lab: &Lab, word: &str) -> Result<()> {
        let line = format!("{word}\n");
        let expected = self.process.stdout().len() + line.len() * self.greetings.len();
        self.process.write(line.as_bytes())?;
        lab.wait_until(
            &format!("the echo of {word:?} on all connections"),
            DEADLINE,
            || (self.process.stdout().len() == expected).then_some(()),
        )?;
        let stdout = self.process.stdout();
        let echoes = String::from_utf8_lossy(&stdout);
        ensure!(
            echoes.ends_with(&line.repeat(self.greetings.len())),
            "wrong echo: {echoes:?}"
        );
        Ok(())
    }

    /// Closes all connections with FIN, and waits until the client program ends.
    ///
    /// # Errors
    /// The program still runs after 15 s.
    pub fn close(mut self) -> Result<Output> {
        self.process.close_stdin();
        self.process.wait(DEADLINE)
    }
}
