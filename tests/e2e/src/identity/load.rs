//! Traffic that goes on until it is told to end.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, Process};

use crate::programs::PORT;
use crate::tcp::{program, refs};

const PROGRAM: &str = include_str!("load.py");

/// The last connections may wait as long as a daemon waits for a certificate.
const DEADLINE: Duration = Duration::from_secs(30);

/// One short connection.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// When it began, in Unix time.
    pub start: f64,
    /// When it ended.
    pub end: f64,
    /// The client's port.
    pub port: u16,
    /// Why it failed, if it did.
    pub failure: Option<String>,
}

/// Clients and daemons write down the end of a connection so much apart at most.
const NOTED: f64 = 5.0;

/// Seconds of a day.
const DAY: f64 = 86_400.0;

impl Attempt {
    /// How many seconds its end is from this time of a day, in seconds since midnight UTC; `None` if
    /// too many for it to be the same end.
    pub fn ended_apart_from(&self, since_midnight: f64) -> Option<f64> {
        let apart = (self.end - since_midnight).rem_euclid(DAY);
        Some(apart.min(DAY - apart)).filter(|apart| *apart < NOTED)
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(5, ' ');
        let how = words.next()?;
        let (start, end) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let port = words.next()?.parse().ok()?;
        let failure = match how {
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

/// HTTP requests, each over a connection of its own, so many a second.
#[derive(Debug)]
pub struct Short(Process);

impl Short {
    /// From a pod to [`PORT`] of an address.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn start(lab: &Lab, pod: &str, to: IpAddr, a_second: u32) -> Result<Self> {
        spawn(lab, pod, "short", to, PORT, a_second).map(Self)
    }

    /// Those that have ended so far.
    pub fn so_far(&self) -> Vec<Attempt> {
        let said = String::from_utf8_lossy(&self.0.stdout()).into_owned();
        said.lines().filter_map(Attempt::parse).collect()
    }

    /// Ends it; all of them.
    ///
    /// # Errors
    /// The program broke.
    pub fn end(mut self) -> Result<Vec<Attempt>> {
        self.0.close_stdin();
        let said = self.0.wait(DEADLINE)?.ok().context("the load")?;
        let attempts: Vec<_> = said.lines().filter_map(Attempt::parse).collect();
        ensure!(
            attempts.len() == said.lines().count(),
            "the load said {said}"
        );
        Ok(attempts)
    }
}

/// One connection on which bytes go to and fro all the time, each of which is compared.
#[derive(Debug)]
pub struct Stream(Process);

impl Stream {
    /// From a pod to an echo server; returns when bytes have come back.
    ///
    /// # Errors
    /// None have.
    pub fn start(lab: &Lab, pod: &str, to: IpAddr, port: u16, kib_a_second: u32) -> Result<Self> {
        let process = spawn(lab, pod, "stream", to, port, kib_a_second)?;
        process.wait_stdout("streaming", DEADLINE)?;
        Ok(Self(process))
    }

    /// It has not failed so far.
    ///
    /// # Errors
    /// It has.
    pub fn going_on(&mut self) -> Result<()> {
        let said = String::from_utf8_lossy(&self.0.stdout()).into_owned();
        ensure!(self.0.is_running() && !said.contains("failed"), "{said}");
        Ok(())
    }

    /// Ends it with FIN; how many bytes came back.
    ///
    /// # Errors
    /// The connection failed, or other bytes came back.
    pub fn end(mut self) -> Result<u64> {
        self.0.close_stdin();
        let said = self.0.wait(DEADLINE)?.ok().context("the stream")?;
        let echoed = said.lines().find_map(|line| line.strip_prefix("echoed "));
        match echoed.and_then(|bytes| bytes.parse().ok()) {
            Some(bytes) => Ok(bytes),
            None => bail!("the stream said {said}"),
        }
    }
}

fn spawn(lab: &Lab, pod: &str, kind: &str, to: IpAddr, port: u16, rate: u32) -> Result<Process> {
    let (to, port, rate) = (to.to_string(), port.to_string(), rate.to_string());
    lab.spawn(pod, &refs(&program(PROGRAM, &[kind, &to, &port, &rate])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_is_read_with_its_failure() {
        let ok = Attempt::parse("ok 1.5 2.5 40000").unwrap();
        assert_eq!((ok.port, ok.failure), (40000, None));
        let failed = Attempt::parse("failed 1.5 2.5 0 [Errno 104] reset by peer").unwrap();
        assert_eq!(failed.failure.as_deref(), Some("[Errno 104] reset by peer"));
        assert_eq!(Attempt::parse("streaming"), None);
    }

    #[test]
    fn the_time_of_a_day_is_compared_across_midnight() {
        let attempt = Attempt::parse("ok 1.5 86399.5 1").unwrap();
        assert_eq!(attempt.ended_apart_from(86_399.0), Some(0.5));
        assert_eq!(attempt.ended_apart_from(0.5), Some(1.0));
        assert_eq!(attempt.ended_apart_from(43_000.0), None);
    }
}
