//! One connection from a client pod to a server pod, and its outcome for the client.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use lab::{IpFamily, Lab, Location, Output};

use super::fixture::{GREETING, HTTP, SERVERS, TCP};

/// How long a client program may run. Every outcome takes less.
const CLIENT_DEADLINE: Duration = Duration::from_secs(10);

/// How long a denied client may wait for the reset. The daemon resets at once; the rest is room for
/// a busy machine. It is less than any timeout of a client.
const RESET_DEADLINE: Duration = Duration::from_secs(3);

/// Prints the first line that the server sends. socat and nc would exit with 0 on a reset.
pub(super) const READ_GREETING: &str = "exec 3<>\"/dev/tcp/$0/$1\" && head -n 1 <&3";

/// A connection from a pod to a port of a pod.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// The client, `namespace/name`.
    pub from: &'a str,
    /// The server, `namespace/name`.
    pub to: &'a str,
    /// The family of the addresses.
    pub family: IpFamily,
    /// The server's port: on [`TCP`] the server sends first, every other port serves HTTP.
    pub port: u16,
}

/// What the client program observed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The correct response.
    Served,
    /// A reset within 3 s, and no bytes.
    Reset,
    /// Anything else, for example an incorrect response or a timeout.
    Other(String),
}

impl fmt::Display for Connection<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            from,
            to,
            family,
            port,
        } = self;
        write!(f, "{from} -> {to}:{port} ({family:?})")
    }
}

impl Connection<'_> {
    /// Opens the connection to the server pod's address.
    ///
    /// # Errors
    /// A pod does not exist, or the client program runs for more than 10 s.
    pub fn open(&self, lab: &Lab) -> Result<Outcome> {
        let to = SocketAddr::new(lab.pod_ip(self.to, self.family)?, self.port);
        self.open_to(lab, to)
    }

    /// Opens the connection to another address of the server, for example its service's.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_to(&self, lab: &Lab, to: SocketAddr) -> Result<Outcome> {
        let client = Location::pod(self.from);
        if self.port == TCP {
            greeting_outcome(lab, &client, to)
        } else {
            http_outcome(lab, &client, to, lab.pod_ip(self.from, self.family)?)
        }
    }
}

/// Every connection of a client: to both servers, to both ports, over both families.
pub fn connections(from: &str) -> impl Iterator<Item = Connection<'_>> {
    let targets = SERVERS
        .iter()
        .flat_map(|(to, _)| [HTTP, TCP].map(|port| (*to, port)));
    targets.flat_map(move |(to, port)| {
        IpFamily::ALL.map(move |family| Connection {
            from,
            to,
            family,
            port,
        })
    })
}

/// Opens every connection of these clients, the clients in parallel. A connection must be served where
/// `is_allowed` is true for its client and port, and be reset otherwise.
///
/// # Errors
/// A connection has another outcome; the error lists all such connections.
pub fn check_connections(
    lab: &Lab,
    clients: &[&str],
    is_allowed: impl Fn(&str, u16) -> bool + Sync,
) -> Result<()> {
    let is_allowed = &is_allowed;
    let mut failures = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = clients
            .iter()
            .map(|client| scope.spawn(move || client_failures(lab, client, is_allowed)))
            .collect();
        for thread in threads {
            let of_client = thread.join().map_err(|_| anyhow!("a thread panicked"))?;
            failures.extend(of_client?);
        }
        Ok(())
    })?;
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    Ok(())
}

fn client_failures(
    lab: &Lab,
    client: &str,
    is_allowed: impl Fn(&str, u16) -> bool,
) -> Result<Vec<String>> {
    let mut failures = Vec::new();
    for connection in connections(client) {
        let expected = match is_allowed(client, connection.port) {
            true => Outcome::Served,
            false => Outcome::Reset,
        };
        let outcome = connection.open(lab)?;
        if outcome != expected {
            failures.push(format!("{connection}: {outcome:?}, expected {expected:?}"));
        }
    }
    Ok(failures)
}

/// Sends an HTTP request with curl. The response must be the client's own address.
///
/// # Errors
/// The client location does not exist, or curl runs for more than 10 s.
pub fn http_outcome(lab: &Lab, from: &Location, to: SocketAddr, client: IpAddr) -> Result<Outcome> {
    let url = format!("http://{to}/");
    // Without -v curl reports an immediate reset only as "could not connect".
    let command = ["curl", "-sv", "-m", "8", "-H", "Connection: close", &url];
    run(lab, from, &command, &client.to_string())
}

/// Connects without sending anything, and expects [`GREETING`].
fn greeting_outcome(lab: &Lab, from: &Location, to: SocketAddr) -> Result<Outcome> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let command = ["bash", "-c", READ_GREETING, &ip, &port];
    run(lab, from, &command, GREETING)
}

fn run(lab: &Lab, from: &Location, command: &[&str], expected: &str) -> Result<Outcome> {
    let start = Instant::now();
    let output = lab.exec_in(from, command, CLIENT_DEADLINE)?;
    Ok(outcome(&output, expected, start.elapsed()))
}

fn outcome(output: &Output, expected: &str, elapsed: Duration) -> Outcome {
    let received = output.stdout.trim();
    let is_reset = output.stderr.to_lowercase().contains("reset by peer");
    match (output.success(), received == expected) {
        (true, true) => Outcome::Served,
        (false, _) if is_reset && received.is_empty() && elapsed < RESET_DEADLINE => Outcome::Reset,
        _ => Outcome::Other(format!(
            "exit code {} after {elapsed:?}, stdout {received:?}, stderr {:?}",
            output.code,
            output.stderr.trim().lines().last().unwrap_or_default()
        )),
    }
}
