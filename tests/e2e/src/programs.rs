//! The real programs that run in pods, and the questions that are put to them.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Location};

/// The port that servers of the suites listen on.
pub const PORT: u16 = 8080;

/// No answer in a lab takes longer, unless something is broken.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// A command line from words.
pub fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// nginx, on both families and these ports, answering every request with `answer`, which may use
/// nginx' variables. Its error log goes to stderr, one line per request to stdout.
pub fn nginx(ports: &[u16], answer: &str) -> Vec<String> {
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
           server {{ {listen}default_type text/plain; location / {{ return 200 \"{answer}\"; }} }}\n\
         }}\n"
    );
    // The lab gives each pod a working directory of its own, and removes it.
    let script =
        "printf %s \"$0\" >nginx.conf; exec nginx -e /dev/stderr -p \"$PWD\" -c nginx.conf";
    words(&["sh", "-c", script, &config])
}

/// A server that says `greeting` as soon as a client is there, and then echoes.
pub fn greeter(port: u16, greeting: &str) -> Vec<String> {
    let listen = format!("TCP6-LISTEN:{port},ipv6only=0,reuseaddr,fork,backlog=128");
    words(&[
        "socat",
        &listen,
        &format!("SYSTEM:echo {greeting}; exec cat"),
    ])
}

/// What curl saw.
#[derive(Debug, Clone)]
pub struct CurlResponse {
    /// The answer's body.
    pub body: String,
    /// curl's own port.
    pub local_port: u16,
    /// Bytes of the request, head and body.
    pub request_bytes: u64,
    /// Bytes of the answer, head and body.
    pub response_bytes: u64,
}

/// A URL of this address.
pub fn url(ip: IpAddr, port: u16) -> String {
    format!("http://{}/", SocketAddr::new(ip, port))
}

/// One GET request, over a connection of its own, from a place.
///
/// # Errors
/// curl did not succeed; the error has its exit code and what it said.
pub fn curl(lab: &Lab, from: &Location, url: &str, args: &[&str]) -> Result<CurlResponse> {
    // The numbers follow the body, which no server of the suites ends with a newline.
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
    let output = lab.exec_in(from, &command, ANSWER_DEADLINE + Duration::from_secs(2))?;
    let said = output
        .ok()
        .with_context(|| format!("curl {url} from {from}"))?;
    let (body, numbers) = said.rsplit_once('\n').context("curl's numbers")?;
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

/// Connects, says nothing, and waits for the end of the connection: what the kernel called that end
/// (empty for an orderly one), and how long it took.
///
/// # Errors
/// The connection lives on for 10 s.
pub fn wait_for_close(lab: &Lab, from: &Location, to: SocketAddr) -> Result<(String, Duration)> {
    let start = std::time::Instant::now();
    let script = "exec 3<>\"/dev/tcp/$0/$1\" && cat <&3";
    let (ip, port) = (to.ip().to_string(), to.port().to_string());
    let output = lab.exec_in(from, &["bash", "-c", script, &ip, &port], ANSWER_DEADLINE)?;
    Ok((output.stderr, start.elapsed()))
}

/// The answers to `count` requests one after the other, from one run of curl, each over a
/// connection of its own.
///
/// # Errors
/// One of them failed.
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
    let output = lab.exec_in(from, &command, ANSWER_DEADLINE * 2)?;
    let said = output
        .ok()
        .with_context(|| format!("curl {url} from {from}"))?;
    let answers: Vec<String> = said
        .lines()
        .filter(|line| !line.starts_with("--_curl_--"))
        .map(str::to_owned)
        .collect();
    ensure!(
        answers.len() == count,
        "{count} requests, {} answers: {answers:?}",
        answers.len()
    );
    Ok(answers)
}

/// The same program, deaf to SIGTERM: it runs until the end of its pod's grace period.
pub fn ignoring_sigterm(command: Vec<String>) -> Vec<String> {
    // A session of its own keeps signals to the container's first process away from it.
    let script = "trap '' TERM; setsid \"$@\" & wait";
    words(&["bash", "-c", script, "ignoring_sigterm"])
        .into_iter()
        .chain(command)
        .collect()
}

/// The daemon's binary: in `$AMBIT_BIN_DIR`, else in the target folder of the running test.
///
/// # Errors
/// It has not been built.
pub fn ztunnel_binary() -> Result<PathBuf> {
    let running = std::env::current_exe().context("the path of the running test")?;
    let dir = std::env::var_os("AMBIT_BIN_DIR").map(PathBuf::from);
    let dir = dir
        .or_else(|| running.ancestors().nth(2).map(PathBuf::from))
        .unwrap_or_default();
    let path = dir.join("ztunnel");
    ensure!(
        path.is_file(),
        "no {}: cargo build -p ztunnel",
        path.display()
    );
    Ok(path)
}
