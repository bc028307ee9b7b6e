//! Client programs that make connections until they are stopped.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, Process};

use crate::programs::PORT;
use crate::tcp::{as_strs, python_command};

const PROGRAM: &str = include_str!("load.py");

/// How long a client may take to stop: as long as a daemon waits for a certificate, and more.
const DEADLINE: Duration = Duration::from_secs(30);

/// One short connection that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct ConnectionRecord {
    /// Its start, Unix time.
    pub start: f64,
    /// Its end, Unix time.
    pub end: f64,
    /// The client's port.
    pub port: u16,
    /// Why it failed; `None` if it succeeded.
    pub failure: Option<String>,
}

/// Client and daemon record the end of a connection within this many seconds of each other.
const MAX_LOG_SKEW: f64 = 5.0;

/// Seconds of a day.
const DAY: f64 = 86_400.0;

impl ConnectionRecord {
    /// How many seconds lie between its end and a time of day (seconds since midnight UTC). `None` if too many for it to
    /// be the same event.
    pub fn seconds_from_end(&self, seconds_since_midnight: f64) -> Option<f64> {
        let distance = (self.end - seconds_since_midnight).rem_euclid(DAY);
        Some(distance.min(DAY - distance)).filter(|distance| *distance < MAX_LOG_SKEW)
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(5, ' ');
        let result = words.next()?;
        let (start, end) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let port = words.next()?.parse().ok()?;
        let failure = match result {
            "ok" => None,
            "failed" => Some(words.next().unwrap_or_default().to_owned()),
            _ => return None,
        };
        Some(Self {
            start,
            end,
            port,
            failure,
        })
    }
}

/// HTTP requests at a fixed rate, each over a new connection.
#[derive(Debug)]
pub struct ShortConnections(Process);

impl ShortConnections {
    /// Starts requests from a pod to [`PORT`] of an address.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn start(lab: &Lab, pod: &str, to: IpAddr, per_second: u32) -> Result<Self> {
        spawn(lab, pod, "short", to, PORT, per_second).map(Self)
    }

    /// The connections that have ended so far.
    pub fn records(&self) -> Vec<ConnectionRecord> {
        let stdout = String::from_utf8_lossy(&self.0.stdout()).into_owned();
        stdout.lines().filter_map(ConnectionRecord::parse).collect()
    }

    /// Stops the client and returns all connections.
    ///
    /// # Errors
    /// The client program failed.
    pub fn finish(mut self) -> Result<Vec<ConnectionRecord>> {
        self.0.close_stdin();
        let stdout = self.0.wait(DEADLINE)?.ok().context("load.py short")?;
        let records: Vec<_> = stdout.lines().filter_map(ConnectionRecord::parse).collect();
        ensure!(
            records.len() == stdout.lines().count(),
            "unexpected output of load.py: {stdout}"
        );
        Ok(records)
    }
}

/// One connection that sends at a fixed rate and compares every echoed byte.
#[derive(Debug)]
pub struct EchoStream(Process);

impl EchoStream {
    /// Connects from a pod to an echo server. Returns when the first bytes have been echoed.
    ///
    /// # Errors
    /// Nothing is echoed within 30 s.
    pub fn start(lab: &Lab, pod: &str, to: IpAddr, port: u16, kib_per_second: u32) -> Result<Self> {
        let process = spawn(lab, pod, "stream", to, port, kib_per_second)?;
        process.wait_stdout("streaming", DEADLINE)?;
        Ok(Self(process))
    }

    /// Checks that the connection has not failed.
    ///
    /// # Errors
    /// It has; the error has the program's output.
    pub fn check_alive(&mut self) -> Result<()> {
        let stdout = String::from_utf8_lossy(&self.0.stdout()).into_owned();
        ensure!(
            self.0.is_running() && !stdout.contains("failed"),
            "{stdout}"
        );
        Ok(())
    }

    /// Closes the connection with FIN and returns how many bytes were echoed.
    ///
    /// # Errors
    /// The connection failed, or an echoed byte differs.
    pub fn finish(mut self) -> Result<u64> {
        self.0.close_stdin();
        let stdout = self.0.wait(DEADLINE)?.ok().context("load.py stream")?;
        let echoed = stdout.lines().find_map(|line| line.strip_prefix("echoed "));
        match echoed.and_then(|bytes| bytes.parse().ok()) {
            Some(bytes) => Ok(bytes),
            None => bail!("no byte count in the output of load.py: {stdout}"),
        }
    }
}

fn spawn(lab: &Lab, pod: &str, kind: &str, to: IpAddr, port: u16, rate: u32) -> Result<Process> {
    let (to, port, rate) = (to.to_string(), port.to_string(), rate.to_string());
    lab.spawn(
        pod,
        &as_strs(&python_command(PROGRAM, &[kind, &to, &port, &rate])),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_parsed_with_its_failure() {
        let ok = ConnectionRecord::parse("ok 1.5 2.5 40000").unwrap();
        assert_eq!((ok.port, ok.failure), (40000, None));
        let failed = ConnectionRecord::parse("failed 1.5 2.5 0 [Errno 104] reset by peer").unwrap();
        assert_eq!(failed.failure.as_deref(), Some("[Errno 104] reset by peer"));
        assert_eq!(ConnectionRecord::parse("streaming"), None);
    }

    #[test]
    fn time_of_day_is_compared_across_midnight() {
        let record = ConnectionRecord::parse("ok 1.5 86399.5 1").unwrap();
        assert_eq!(record.seconds_from_end(86_399.0), Some(0.5));
        assert_eq!(record.seconds_from_end(0.5), Some(1.0));
        assert_eq!(record.seconds_from_end(43_000.0), None);
    }
}
