//! HTTP GET for kubelet probes and for the admin ports of the lab's programs.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// No response that the lab requests is larger. A larger one is an error.
const MAX_BODY_BYTES: u64 = 64 * 1024 * 1024;

/// An HTTP response.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body as text; invalid UTF-8 is replaced.
    pub body: String,
}

impl Response {
    /// The body of a response whose status must be 200.
    ///
    /// # Errors
    /// The status is not 200.
    pub fn ok(self) -> Result<String> {
        if self.status == 200 {
            return Ok(self.body);
        }
        bail!("status {}: {}", self.status, self.body.trim_end())
    }
}

/// Sends one GET request on a connection of its own, within `timeout` in total. Any status is a
/// response; redirects are not followed. The `Host` header is the address unless `headers` has one.
///
/// Sockets are opened on the calling thread, and so in its network namespace.
pub(crate) fn get(
    to: SocketAddr,
    path: &str,
    headers: &[(String, String)],
    timeout: Duration,
) -> Result<Response> {
    let client: ureq::Agent = ureq::Agent::config_builder()
        // The environment of the test run must not redirect requests inside a lab.
        .proxy(None)
        .http_status_as_error(false)
        .max_redirects(0)
        .user_agent("")
        .accept("")
        .timeout_global(Some(timeout))
        .build()
        .into();
    let slash = if path.starts_with('/') { "" } else { "/" };
    let mut request = client
        .get(format!("http://{to}{slash}{path}"))
        .header("Connection", "close");
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let mut response = request.call()?;
    let body = response
        .body_mut()
        .with_config()
        .limit(MAX_BODY_BYTES)
        .lossy_utf8(true)
        .read_to_string()
        .context("response body")?;
    Ok(Response {
        status: response.status().as_u16(),
        body,
    })
}

/// The state that a daemon's configuration dump reports for the workload with this Kubernetes uid.
pub(crate) fn workload_state<'a>(dump: &'a Value, kube_uid: &str) -> Option<&'a str> {
    let states = dump.get("workloadState")?.as_object()?;
    let (_, state) = states
        .iter()
        .find(|(uid, _)| uid.rsplit('/').next().is_some_and(|last| last == kube_uid))?;
    state.get("state")?.as_str()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::thread::{self, JoinHandle};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// Serves one connection: reads the request head, writes `response`, closes. Returns the head.
    fn serve(response: &'static str) -> (SocketAddr, JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let head: Vec<String> = lines
                .map(Result::unwrap)
                .take_while(|line| !line.is_empty())
                .collect();
            stream.write_all(response.as_bytes()).unwrap();
            head
        });
        (address, server)
    }

    fn get_from(response: &'static str) -> Result<Response> {
        let (address, server) = serve(response);
        let response = get(address, "/", &[], TIMEOUT);
        server.join().unwrap();
        response
    }

    #[test]
    fn request_has_one_host_header_and_no_defaults() {
        let (address, server) = serve("HTTP/1.1 200 OK\r\n\r\n");
        get(address, "/ready?x=1", &[], TIMEOUT).unwrap();
        let mut head = server.join().unwrap();
        assert_eq!(head.remove(0), "GET /ready?x=1 HTTP/1.1");
        head.iter_mut().for_each(|line| line.make_ascii_lowercase());
        head.sort();
        assert_eq!(
            head,
            ["connection: close".to_owned(), format!("host: {address}")]
        );
    }

    #[test]
    fn configured_host_header_replaces_the_address() {
        let (address, server) = serve("HTTP/1.1 200 OK\r\n\r\n");
        let headers = [("Host".to_owned(), "web.shop".to_owned())];
        get(address, "ready", &headers, TIMEOUT).unwrap();
        let head = server.join().unwrap();
        assert_eq!(head[0], "GET /ready HTTP/1.1");
        let hosts: Vec<_> = head
            .iter()
            .filter(|line| line.to_ascii_lowercase().starts_with("host:"))
            .collect();
        assert_eq!(hosts.len(), 1, "{head:?}");
        assert!(hosts[0].ends_with("web.shop"), "{head:?}");
    }

    #[test]
    fn error_status_is_a_response() {
        let response =
            get_from("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3\r\n\r\nno\n").unwrap();
        assert_eq!((response.status, response.body.as_str()), (503, "no\n"));
    }

    #[test]
    fn redirect_is_not_followed() {
        let response = get_from("HTTP/1.1 302 Found\r\nLocation: /other\r\n\r\n").unwrap();
        assert_eq!(response.status, 302);
    }

    #[test]
    fn http_1_0_body_ends_with_the_connection() {
        let response = get_from("HTTP/1.0 200 OK\r\n\r\nall of it").unwrap();
        assert_eq!(response.ok().unwrap(), "all of it");
    }

    #[test]
    fn other_protocol_is_an_error() {
        assert!(get_from("220 smtp ready\r\n").is_err());
        assert!(get_from("").is_err());
    }

    #[test]
    fn silent_server_is_an_error_after_the_timeout() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(get(address, "/", &[], Duration::from_millis(50)).is_err());
    }

    #[test]
    fn workload_is_found_by_its_kubernetes_uid() {
        let dump =
            serde_json::json!({"workloadState": {"c//Pod/shop/web/u1": {"state": "enrolled"}}});
        assert_eq!(workload_state(&dump, "u1"), Some("enrolled"));
        assert_eq!(workload_state(&dump, "1"), None);
    }
}
