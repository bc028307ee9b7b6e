//! Connections that a client pod holds open to a greeter.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Output, Process};

use crate::programs::{PORT, words};

/// An answer takes milliseconds; dozens of connections on a busy machine take seconds.
const DEADLINE: Duration = Duration::from_secs(15);

/// Opens connections one after the other and prints the greeting of each, then `held`. For every
/// line on its stdin it sends that line on each connection and prints what comes back.
const SCRIPT: &str = "for i in $(seq \"$2\"); do exec {fd}<>\"/dev/tcp/$0/$1\" || exit 9; \
                      fds+=($fd); read -r line <&$fd || exit 8; echo \"$line\"; done; echo held; \
                      while read -r word; do for fd in \"${fds[@]}\"; do echo \"$word\" >&$fd; \
                      read -r line <&$fd || exit 7; echo \"$line\"; done; done";

/// Open connections; dropping it resets them.
#[derive(Debug)]
pub struct Held {
    process: Process,
    /// What each was greeted with.
    pub greetings: Vec<String>,
}

impl Held {
    /// Opens `count` connections from a pod to [`PORT`] of an address, one after the other.
    ///
    /// # Errors
    /// One of them was refused, or not greeted in time.
    pub fn open(lab: &Lab, pod: &str, to: IpAddr, count: usize) -> Result<Self> {
        let (ip, port, number) = (to.to_string(), PORT.to_string(), count.to_string());
        let command = words(&["bash", "-c", SCRIPT, &ip, &port, &number]);
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        let process = lab.spawn(pod, &command)?;
        process
            .wait_stdout("held\n", DEADLINE)
            .with_context(|| format!("{pod} to {to}"))?;
        let said = String::from_utf8_lossy(&process.stdout()).into_owned();
        let greetings: Vec<String> = said
            .lines()
            .take_while(|line| *line != "held")
            .map(str::to_owned)
            .collect();
        ensure!(
            greetings.len() == count,
            "{count} connections, {greetings:?}"
        );
        Ok(Self { process, greetings })
    }

    /// Sends a word on every connection and waits for all echoes.
    ///
    /// # Errors
    /// One of them did not come back.
    pub fn says(&mut self, lab: &Lab, word: &str) -> Result<()> {
        let line = format!("{word}\n");
        let expected = self.process.stdout().len() + line.len() * self.greetings.len();
        self.process.write(line.as_bytes())?;
        lab.wait_until(
            &format!("the echo of {word:?} on all connections"),
            DEADLINE,
            || (self.process.stdout().len() == expected).then_some(()),
        )?;
        let said = self.process.stdout();
        let echoes = String::from_utf8_lossy(&said);
        ensure!(
            echoes.ends_with(&line.repeat(self.greetings.len())),
            "{echoes:?}"
        );
        Ok(())
    }

    /// Closes all connections in order, and waits for the program's end.
    ///
    /// # Errors
    /// It does not end.
    pub fn close(mut self) -> Result<Output> {
        self.process.close_stdin();
        self.process.wait(DEADLINE)
    }
}
