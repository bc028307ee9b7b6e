//! One connection of a client to a server, and how it ended for the client.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use lab::{IpFamily, Lab, Location, Output};

use super::fixture::{GREETING, TCP};

/// No connection takes longer, whatever its end.
const DEADLINE: Duration = Duration::from_secs(10);

/// How long a refusal may take. It is a reset at once; this leaves room for a busy machine, and is
/// less than any timeout of a client.
pub const PROMPT: Duration = Duration::from_secs(3);

/// From a pod to a port of a pod.
#[derive(Debug, Clone, Copy)]
pub struct Connection<'a> {
    /// The client, `namespace/name`.
    pub from: &'a str,
    /// The server, `namespace/name`.
    pub to: &'a str,
    /// Over which of their addresses.
    pub family: IpFamily,
    /// The server's port: on [`TCP`] the server speaks first, on every other port it is http_outcome by HTTP.
    pub port: u16,
}

/// What the client's program saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The right answer.
    Answered,
    /// A reset, and soon.
    Reset,
    /// Anything else, a wrong answer or a wait among it.
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
    /// Makes the connection.
    ///
    /// # Errors
    /// A pod is missing, or the program does not end within 10 s.
    pub fn open(&self, lab: &Lab) -> Result<Outcome> {
        let to = SocketAddr::new(lab.pod_ip(self.to, self.family)?, self.port);
        let client = lab.pod_ip(self.from, self.family)?;
        self.at(lab, &Location::pod(self.from), to, client)
    }

    /// The same to an address of the server's service, say.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_to(&self, lab: &Lab, to: SocketAddr) -> Result<Outcome> {
        let client = lab.pod_ip(self.from, self.family)?;
        self.at(lab, &Location::pod(self.from), to, client)
    }

    fn at(&self, lab: &Lab, place: &Location, to: SocketAddr, client: IpAddr) -> Result<Outcome> {
        if self.port == TCP {
            greeting_outcome(lab, place, to)
        } else {
            http_outcome(lab, place, to, client)
        }
    }
}

/// A request of curl, whose answer must be the client's own address.
///
/// # Errors
/// There is no such place.
pub fn http_outcome(
    lab: &Lab,
    place: &Location,
    to: SocketAddr,
    client: IpAddr,
) -> Result<Outcome> {
    let url = format!("http://{to}/");
    // Verbose, because otherwise it says of a connection that is reset at once only that it could not connect.
    let command = ["curl", "-sv", "-m", "8", "-H", "Connection: close", &url];
    run(lab, place, &command, &client.to_string())
}

/// A connection on which the client says nothing and must be greeting_outcome.
///
/// # Errors
/// There is no such place.
pub fn greeting_outcome(lab: &Lab, place: &Location, to: SocketAddr) -> Result<Outcome> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    run(lab, place, &["bash", "-c", GREETED, &ip, &port], GREETING)
}

/// The first line of what the server says. socat and nc would pass a reset off as a good end.
pub(super) const GREETED: &str = "exec 3<>\"/dev/tcp/$0/$1\" && head -n 1 <&3";

fn run(lab: &Lab, place: &Location, command: &[&str], answer: &str) -> Result<Outcome> {
    let start = Instant::now();
    let output = lab.exec_in(place, command, DEADLINE)?;
    Ok(seen(&output, answer, start.elapsed()))
}

fn seen(output: &Output, answer: &str, took: Duration) -> Outcome {
    let said = output.stdout.trim();
    let reset = output.stderr.to_lowercase().contains("reset by peer");
    match (output.success(), said == answer) {
        (true, true) => Outcome::Answered,
        (false, _) if reset && said.is_empty() && took < PROMPT => Outcome::Reset,
        _ => Outcome::Other(format!(
            "after {took:?} exit code {}, {said:?}, {:?}",
            output.code,
            output.stderr.trim().lines().last().unwrap_or_default()
        )),
    }
}
