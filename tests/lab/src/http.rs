//! Just enough HTTP to be a kubelet and to read a daemon's admin port.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

/// No answer that the lab asks for is larger; a server that sends more is cut off.
const MAX_ANSWER: usize = 64 * 1024 * 1024;

/// An HTTP answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body as text.
    pub body: String,
}

impl Response {
    /// The body of an answer that must be 200.
    ///
    /// # Errors
    /// It is not.
    pub fn ok(self) -> Result<String> {
        if self.status == 200 {
            return Ok(self.body);
        }
        bail!("status {}: {}", self.status, self.body.trim_end())
    }
}

/// GET over a connection of its own. Speaks HTTP/1.0, so that the end of the connection is the end
/// of the body and nothing is chunked.
pub(crate) fn get(
    to: SocketAddr,
    host: &str,
    path: &str,
    headers: &[(String, String)],
    within: Duration,
) -> io::Result<Response> {
    let deadline = Instant::now() + within;
    let mut stream = TcpStream::connect_timeout(&to, within)?;
    let mut head = format!("GET {path} HTTP/1.0\r\nConnection: close\r\n");
    if !headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("host"))
    {
        head.push_str(&format!("Host: {host}\r\n"));
    }
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.set_write_timeout(Some(within))?;
    stream.write_all(head.as_bytes())?;
    parse(&read_to_end(&mut stream, deadline)?)
}

fn read_to_end(stream: &mut TcpStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 64 * 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || bytes.len() > MAX_ANSWER {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A server that resets after its answer has still answered.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset && !bytes.is_empty() => {
                return Ok(bytes);
            }
            Err(error) => return Err(error),
        }
    }
}

fn parse(bytes: &[u8]) -> io::Result<Response> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut words = head.lines().next().unwrap_or_default().split(' ');
    let version = words.next().unwrap_or_default();
    match (
        version.starts_with("HTTP/1."),
        words.next().and_then(|code| code.parse().ok()),
    ) {
        (true, Some(status)) => Ok(Response {
            status,
            body: body.to_owned(),
        }),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not an HTTP answer",
        )),
    }
}

/// The state a daemon reports of the workload whose uid ends in this Kubernetes uid.
pub(crate) fn workload_state<'a>(dump: &'a Value, kube_uid: &str) -> Option<&'a str> {
    let states = dump.get("workloadState")?.as_object()?;
    let (_, state) = states
        .iter()
        .find(|(uid, _)| uid.rsplit('/').next().is_some_and(|last| last == kube_uid))?;
    state.get("state")?.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_status_and_its_body() {
        let answer = parse(b"HTTP/1.1 503 Service Unavailable\r\nA: b\r\n\r\nno\n").unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (503, "no\n"));
    }

    #[test]
    fn what_is_not_http_is_an_error() {
        assert!(parse(b"220 smtp ready\r\n").is_err());
        assert!(parse(b"").is_err());
    }

    #[test]
    fn a_workload_is_found_by_its_kubernetes_uid() {
        let dump =
            serde_json::json!({"workloadState": {"c//Pod/shop/web/u1": {"state": "enrolled"}}});
        assert_eq!(workload_state(&dump, "u1"), Some("enrolled"));
        assert_eq!(workload_state(&dump, "1"), None);
    }
}
