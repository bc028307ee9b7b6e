//! One connection of a client to a server, and how it ended for the client.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use lab::{IpFamily, Lab, Location, Output};

use super::town::{GREETING, TCP};

/// No attempt takes longer, whatever its end.
const DEADLINE: Duration = Duration::from_secs(10);

/// How long a refusal may take. It is a reset at once; this leaves room for a busy machine, and is
/// less than any timeout of a client.
pub const PROMPT: Duration = Duration::from_secs(3);

/// From a pod to a port of a pod.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    /// The client, `namespace/name`.
    pub from: &'a str,
    /// The server, `namespace/name`.
    pub to: &'a str,
    /// Over which of their addresses.
    pub family: IpFamily,
    /// The server's port: on [`TCP`] the server speaks first, on every other port it is asked by HTTP.
    pub port: u16,
}

/// What the client's program saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// The right answer.
    Answered,
    /// A reset, and soon.
    Reset,
    /// Anything else, a wrong answer or a wait among it.
    Otherwise(String),
}

impl fmt::Display for Attempt<'_> {
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

impl Attempt<'_> {
    /// Makes the connection.
    ///
    /// # Errors
    /// A pod is missing, or the program does not end within 10 s.
    pub fn make(&self, lab: &Lab) -> Result<Seen> {
        let to = SocketAddr::new(lab.pod_ip(self.to, self.family)?, self.port);
        let client = lab.pod_ip(self.from, self.family)?;
        self.at(lab, &Location::pod(self.from), to, client)
    }

    /// The same to an address of the server's service, say.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn make_to(&self, lab: &Lab, to: SocketAddr) -> Result<Seen> {
        let client = lab.pod_ip(self.from, self.family)?;
        self.at(lab, &Location::pod(self.from), to, client)
    }

    fn at(&self, lab: &Lab, place: &Location, to: SocketAddr, client: IpAddr) -> Result<Seen> {
        if self.port == TCP {
            greeted(lab, place, to)
        } else {
            asked(lab, place, to, client)
        }
    }
}

/// A request of curl, whose answer must be the client's own address.
///
/// # Errors
/// There is no such place.
pub fn asked(lab: &Lab, place: &Location, to: SocketAddr, client: IpAddr) -> Result<Seen> {
    let url = format!("http://{to}/");
    // Verbose, because otherwise it says of a connection that is reset at once only that it could not connect.
    let command = ["curl", "-sv", "-m", "8", "-H", "Connection: close", &url];
    run(lab, place, &command, &client.to_string())
}

/// A connection on which the client says nothing and must be greeted.
///
/// # Errors
/// There is no such place.
pub fn greeted(lab: &Lab, place: &Location, to: SocketAddr) -> Result<Seen> {
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    run(lab, place, &["bash", "-c", GREETED, &ip, &port], GREETING)
}

/// The first line of what the server says. socat and nc would pass a reset off as a good end.
pub(super) const GREETED: &str = "exec 3<>\"/dev/tcp/$0/$1\" && head -n 1 <&3";

fn run(lab: &Lab, place: &Location, command: &[&str], answer: &str) -> Result<Seen> {
    let start = Instant::now();
    let output = lab.exec_in(place, command, DEADLINE)?;
    Ok(seen(&output, answer, start.elapsed()))
}

fn seen(output: &Output, answer: &str, took: Duration) -> Seen {
    let said = output.stdout.trim();
    let reset = output.stderr.to_lowercase().contains("reset by peer");
    match (output.success(), said == answer) {
        (true, true) => Seen::Answered,
        (false, _) if reset && said.is_empty() && took < PROMPT => Seen::Reset,
        _ => Seen::Otherwise(format!(
            "after {took:?} exit code {}, {said:?}, {:?}",
            output.code,
            output.stderr.trim().lines().last().unwrap_or_default()
        )),
    }
}
