//! Commands of the servers that run in pods, and client requests to them.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Location};

/// The port that servers of the suites listen on.
pub const PORT: u16 = 8080;

/// Limit of one request. A response in a lab takes milliseconds.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// Owned words of a command line.
pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The command of nginx on these ports of both families. It responds to every request with `body`,
/// which may contain nginx variables. The error log goes to stderr, one line per request to stdout.
pub fn nginx(ports: &[u16], body: &str) -> Vec<String> {
    let listen: String = ports
        .iter()
        .map(|port| format!("listen {port}; listen [::]:{port}; "))
        .collect();
    let config = format!(
        "daemon off; master_process off; pid nginx.pid; error_log /dev/stderr;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
           log_format e2e '$remote_addr $server_port $request_uri $http_user_agent';\n\
           access_log /dev/stdout e2e;\n\
           server {{ {listen}default_type text/plain; location / {{ return 200 \"{body}\"; }} }}\n\
         }}\n"
    );
    // The lab gives each pod a working directory of its own, and removes it.
    let script =
        "printf %s \"$0\" >nginx.conf; exec nginx -e /dev/stderr -p \"$PWD\" -c nginx.conf";
    words(&["sh", "-c", script, &config])
}

/// The command of a server that sends `greeting` to each client at once, and then echoes.
pub fn greeter(port: u16, greeting: &str) -> Vec<String> {
    let listen = format!("TCP6-LISTEN:{port},ipv6only=0,reuseaddr,fork,backlog=128");
    words(&[
        "socat",
        &listen,
        &format!("SYSTEM:echo {greeting}; exec cat"),
    ])
}

/// A response as curl received it.
#[derive(Debug, Clone)]
pub struct CurlResponse {
    /// The body.
    pub body: String,
    /// The client port of the connection.
    pub local_port: u16,
    /// Size of the request in bytes, headers included.
    pub request_bytes: u64,
    /// Size of the response in bytes, headers included.
    pub response_bytes: u64,
}

/// The URL of an address.
pub fn url(ip: IpAddr, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(ip, port))
}

/// Sends one GET request on a new connection from a location, with additional arguments of curl.
///
/// # Errors
/// curl fails; the error has its exit code and output.
pub fn curl(lab: &Lab, from: &Location, url: &str, args: &[&str]) -> Result<CurlResponse> {
    // The numbers follow the body; no server of the suites ends its body with a newline.
    let format = "\n%{local_port} %{size_request} %{size_header} %{size_download}";
    let mut command = vec![
        "curl",
        "-sS",
        "--max-time",
        "10",
        "-H",
        "Connection: close",
        "-w",
        format,
    ];
    command.extend_from_slice(args);
    command.push(url);
    let output = lab.exec_in(from, &command, REQUEST_DEADLINE + Duration::from_secs(2))?;
    let stdout = output
        .ok()
        .with_context(|| format!("curl {url} from {from}"))?;
    let (body, numbers) = stdout.rsplit_once('\n').context("curl's numbers")?;
    let numbers: Vec<u64> = numbers
        .split(' ')
        .filter_map(|number| number.parse().ok())
        .collect();
    let [port, request, head, download] = numbers[..] else {
        anyhow::bail!("curl's numbers: {numbers:?}");
    };
    let local_port = u16::try_from(port).context("curl's port")?;
    let body = body.to_owned();
    Ok(CurlResponse {
        body,
        local_port,
        request_bytes: request,
        response_bytes: head + download,
    })
}

/// Connects without sending anything and waits for the server to close. Returns the client's error
/// text, which is empty after a FIN, and the duration.
///
/// # Errors
/// The connection is open after 10 s.
pub fn wait_for_close(lab: &Lab, from: &Location, to: SocketAddr) -> Result<(String, Duration)> {
    let start = std::time::Instant::now();
    let script = "exec 3<>\"/dev/tcp/$0/$1\" && cat <&3";
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let output = lab.exec_in(from, &["bash", "-c", script, &ip, &port], REQUEST_DEADLINE)?;
    Ok((output.stderr, start.elapsed()))
}

/// Sends `count` requests from one run of curl, one after the other, each on a new connection.
/// Returns the response bodies.
///
/// # Errors
/// A request fails.
pub fn curl_many(lab: &Lab, from: &Location, url: &str, count: usize) -> Result<Vec<String>> {
    let url = format!("{url}[1-{count}]");
    let command = [
        "curl",
        "-sS",
        "--fail-early",
        "--max-time",
        "10",
        "-H",
        "Connection: close",
        "-w",
        "\n",
        &url,
    ];
    let output = lab.exec_in(from, &command, REQUEST_DEADLINE * 2)?;
    let stdout = output
        .ok()
        .with_context(|| format!("curl {url} from {from}"))?;
    let responses: Vec<String> = stdout
        .lines()
        .filter(|line| !line.starts_with("--_curl_--"))
        .map(str::to_owned)
        .collect();
    ensure!(
        responses.len() == count,
        "{count} requests, {} responses: {responses:?}",
        responses.len()
    );
    Ok(responses)
}

/// The command with SIGTERM ignored: it runs until the end of the pod's grace period.
pub fn ignoring_sigterm(command: Vec<String>) -> Vec<String> {
    // In its own session the command does not receive signals to the container's first process.
    let script = "trap '' TERM; setsid \"$@\" & wait";
    words(&["bash", "-c", script, "ignoring_sigterm"])
        .into_iter()
        .chain(command)
        .collect()
}

/// The path of the daemon's binary, in `$AMBIT_BIN_DIR` or else in the target folder of the running
/// test.
///
/// # Errors
/// The binary has not been built.
pub fn ztunnel_binary() -> Result<PathBuf> {
    let running = std::env::current_exe().context("the path of the running test")?;
    let dir = std::env::var_os("AMBIT_BIN_DIR").map(PathBuf::from);
    let dir = dir
        .or_else(|| running.ancestors().nth(2).map(PathBuf::from))
        .unwrap_or_default();
    let path = dir.join("ztunnel");
    ensure!(
        path.is_file(),
        "{} does not exist; run cargo build -p ztunnel",
        path.display()
    );
    Ok(path)
}
