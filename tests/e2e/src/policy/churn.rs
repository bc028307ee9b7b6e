//! Continuous edits of policies whose meaning stays the same, and the clients that observe them.
//!
//! The file `guard.yaml` denies [`PRODUCTPAGE`]; the file `base.yaml` allows
//! [`FOO`](super::fixture::FOO) and [`BAR`](super::fixture::BAR). Both are rewritten continuously: as
//! an equivalent policy, as an invalid one, or truncated. Other files of policies that do not change
//! the combined result are added, replaced and removed meanwhile.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fastrand::Rng;
use lab::{IpFamily, Lab, Location, Process};

use super::connection::READ_GREETING;
use super::fixture::{HTTP, PRODUCTPAGE, SERVERS, TCP};
use crate::input::SourceFile;

/// Requests per second of each [`Prober`].
const RATE: &str = "40/s";

/// Number of policy files besides the guard and the base.
const OTHER_FILES: usize = 6;

/// A client that sends HTTP requests to one server, each on a new connection.
#[derive(Debug)]
pub struct Prober {
    curl: Process,
    /// Client, server and family, for error texts.
    name: String,
}

impl Prober {
    /// Starts a prober in `from` for each server and family.
    ///
    /// # Errors
    /// A pod does not exist.
    pub fn start_all(lab: &Lab, from: &str) -> Result<Vec<Self>> {
        let mut probers = Vec::new();
        for (to, _) in SERVERS {
            for family in IpFamily::ALL {
                probers.push(Self::start(lab, from, to, family)?);
            }
        }
        Ok(probers)
    }

    fn start(lab: &Lab, from: &str, to: &str, family: IpFamily) -> Result<Self> {
        let address = SocketAddr::new(lab.pod_ip(to, family)?, HTTP);
        let url = format!("http://{address}/[1-1000000]");
        let report = "%{stderr}%{exitcode}\n";
        let command = [
            "curl",
            "-s",
            "--rate",
            RATE,
            "-m",
            "15",
            "-H",
            "Connection: close",
            "-w",
            report,
            "-o",
            "/dev/null",
            &url,
        ];
        Ok(Self {
            curl: lab.spawn_in(&Location::pod(from), &command)?,
            name: format!("{from} -> {to} ({family:?})"),
        })
    }

    /// Kills the prober. Returns the number of connections, which all ended with one of these exit
    /// codes of curl.
    ///
    /// # Errors
    /// A connection ended with another exit code.
    pub fn finish(self, expected: &[u8]) -> Result<usize> {
        let exit_codes = self.exit_codes();
        let unexpected: Vec<_> = exit_codes
            .iter()
            .enumerate()
            .filter(|(_, exit_code)| !expected.contains(exit_code))
            .collect();
        ensure!(
            unexpected.is_empty(),
            "{}: {} of {} connections ended with an exit code that is not in {expected:?}: {:?}...",
            self.name,
            unexpected.len(),
            exit_codes.len(),
            &unexpected[..unexpected.len().min(10)]
        );
        Ok(exit_codes.len())
    }

    fn exit_codes(&self) -> Vec<u8> {
        let stderr = String::from_utf8_lossy(&self.curl.stderr()).into_owned();
        complete_lines(&stderr)
            .lines()
            .map(|code| code.parse().unwrap_or(u8::MAX))
            .collect()
    }
}

/// The text without its last line if that line is not complete.
fn complete_lines(text: &str) -> &str {
    text.rsplit_once('\n').map_or("", |(complete, _)| complete)
}

/// A client that connects repeatedly to a server that sends first, and collects what it receives.
#[derive(Debug)]
pub struct GreetingReader {
    bash: Process,
    /// Client, server and family, for error texts.
    name: String,
}

impl GreetingReader {
    /// Starts a reader in `from` for each server and family.
    ///
    /// # Errors
    /// A pod does not exist.
    pub fn start_all(lab: &Lab, from: &str) -> Result<Vec<Self>> {
        let mut readers = Vec::new();
        for (to, _) in SERVERS {
            for family in IpFamily::ALL {
                let address = SocketAddr::new(lab.pod_ip(to, family)?, TCP);
                let (ip, port) = (address.ip().to_string(), address.port().to_string());
                let script = format!("while :; do ( {READ_GREETING} ); sleep 0.1; done");
                readers.push(Self {
                    bash: lab.spawn(from, &["bash", "-c", &script, &ip, &port])?,
                    name: format!("{from} -> {to} ({family:?})"),
                });
            }
        }
        Ok(readers)
    }

    /// Kills the reader. Returns the number of connections, which were all reset without a byte.
    ///
    /// # Errors
    /// Bytes arrived, or a connection ended in another way.
    pub fn finish(self) -> Result<usize> {
        let received = self.bash.stdout();
        ensure!(
            received.is_empty(),
            "{} received {} bytes",
            self.name,
            received.len()
        );
        let stderr = String::from_utf8_lossy(&self.bash.stderr()).to_lowercase();
        let stderr = complete_lines(&stderr);
        let unexpected: Vec<_> = stderr
            .lines()
            .filter(|line| !line.contains("reset by peer"))
            .take(10)
            .collect();
        ensure!(unexpected.is_empty(), "{}: {unexpected:?}", self.name);
        Ok(stderr.lines().count())
    }
}

/// The edited policy files.
#[derive(Debug)]
pub struct PolicyChurn {
    guard: SourceFile,
    base: SourceFile,
    others: Vec<Option<SourceFile>>,
    random: Rng,
    /// A description of each edit, for error texts.
    edits: Vec<String>,
}

impl PolicyChurn {
    /// Writes the guard and the base.
    ///
    /// # Errors
    /// The source folder cannot be written to.
    pub fn start(lab: &Lab, seed: u64) -> Result<Self> {
        Ok(Self {
            guard: SourceFile::write(lab, "guard.yaml", guard(0))?,
            base: SourceFile::write(lab, "base.yaml", base(0))?,
            others: (0..OTHER_FILES).map(|_| None).collect(),
            random: Rng::with_seed(seed),
            edits: Vec::new(),
        })
    }

    /// Makes `per_second` edits a second for `duration`. Returns the number of edits.
    ///
    /// # Errors
    /// The source folder cannot be written to.
    pub fn run(&mut self, lab: &Lab, per_second: u32, duration: Duration) -> Result<usize> {
        let (start, interval) = (Instant::now(), Duration::from_secs(1) / per_second);
        let mut due = start;
        while start.elapsed() < duration {
            self.edit(lab)?;
            due += interval;
            // Sets the pace of the edits; it waits for no event.
            std::thread::park_timeout(due.saturating_duration_since(Instant::now()));
        }
        Ok(self.edits.len())
    }

    /// Descriptions of the last 20 edits.
    pub fn last_edits(&self) -> &[String] {
        &self.edits[self.edits.len().saturating_sub(20)..]
    }

    fn edit(&mut self, lab: &Lab) -> Result<()> {
        let description = match self.random.u8(..100) {
            0..30 => rewrite(&self.guard, guard, &mut self.random)?,
            30..50 => rewrite(&self.base, base, &mut self.random)?,
            50..96 => self.edit_other(lab)?,
            _ => self.edit_labels(lab)?,
        };
        self.edits.push(description);
        Ok(())
    }

    /// Adds, replaces or removes one of the other files.
    fn edit_other(&mut self, lab: &Lab) -> Result<String> {
        let index = self.random.usize(..OTHER_FILES);
        let file = format!("other-{index}.yaml");
        if self.others[index].is_some() && self.random.u8(..3) == 0 {
            self.others[index] = None;
            return Ok(format!("{file} removed"));
        }
        let text = other(index, self.random.usize(..));
        let description = format!("{file} {text}");
        match &self.others[index] {
            Some(other) => other.replace(text)?,
            None => self.others[index] = Some(SourceFile::write(lab, &file, text)?),
        }
        Ok(description)
    }

    /// Sets or removes a label that some of the other policies select.
    fn edit_labels(&mut self, lab: &Lab) -> Result<String> {
        let (kind, name) = match self.random.u8(..3) {
            0 => ("Pod", "foo/near"),
            1 => ("Pod", "foo/far"),
            _ => ("Namespace", "bar"),
        };
        let value = self.random.bool().then_some("yes");
        lab.label(kind, name, &[("flip", value)])?;
        Ok(format!("{kind} {name} flip={value:?}"))
    }

    /// Restores every file to a valid policy. Removed files stay removed.
    ///
    /// # Errors
    /// The source folder cannot be written to.
    pub fn restore(&self) -> Result<()> {
        self.guard.replace(guard(0))?;
        self.base.replace(base(0))?;
        for (index, other) in self.others.iter().enumerate() {
            if let Some(file) = other {
                // Versions 5 to 10 are valid. For an invalid one a restarted daemon would have no last
                // valid version.
                file.replace(self::other(index, index + 5))?;
            }
        }
        Ok(())
    }
}

/// Writes a random version of a policy, by rename or in place.
fn rewrite(file: &SourceFile, version: fn(usize) -> String, random: &mut Rng) -> Result<String> {
    let text = match random.u8(..10) {
        0..7 => version(random.usize(..)),
        _ => invalid(&version(0), random),
    };
    match random.u8(..10) {
        // No prefix of a line of JSON is a complete document.
        0..2 => file.overwrite(version(0))?,
        2 => {
            file.overwrite("")?;
            file.replace(&text)?;
        }
        _ => file.replace(&text)?,
    }
    Ok(text)
}

/// An invalid version of a policy, for which a daemon keeps the last valid one.
fn invalid(json: &str, random: &mut Rng) -> String {
    match random.u8(..6) {
        0 => json[..random.usize(1..json.len())].to_owned(),
        1 => json.replace("\"rules\"", "\"rulez\""),
        2 => json.replace(
            "\"source\":{",
            "\"source\":{\"ipBlocks\":[\"10.244.1.300\"],",
        ),
        3 => json.replace("\"action\":\"", "\"action\":\"X"),
        4 => json.replace("\"principals\":[", "\"principals\":[\"\","),
        _ => json.replace("\"source\":{", "\"source\":{\"fromTheFuture\":[\"x\"],"),
    }
}

/// A policy in namespace `foo`, as one line of JSON.
fn policy(kind: &str, name: &str, spec: &str) -> String {
    let api = match kind {
        "NetworkPolicy" => "networking.k8s.io/v1",
        _ => "security.istio.io/v1",
    };
    format!(
        "{{\"apiVersion\":\"{api}\",\"kind\":\"{kind}\",\"metadata\":{{\"name\":\"{name}\",\"namespace\":\"foo\"}},\
         \"spec\":{spec}}}"
    )
}

fn authorization(name: &str, action: &str, rules: &str) -> String {
    let spec = format!("{{\"action\":\"{action}\",\"rules\":[{rules}]}}");
    policy("AuthorizationPolicy", name, &spec)
}

fn rule_from(source: &str) -> String {
    format!("{{\"from\":[{{\"source\":{{{source}}}}}]}}")
}

/// Equivalent policies that deny [`PRODUCTPAGE`] and neither `foo` nor `bar`.
fn guard(version: usize) -> String {
    const RULES: [&str; 8] = [
        r#"{"from":[{"source":{"principals":["cluster.local/ns/default/sa/productpage"]}}]}"#,
        r#"{"from":[{"source":{"principals":["cluster.local/ns/default/sa/product*"]}}]}"#,
        r#"{"from":[{"source":{"principals":["x/ns/y/sa/z","*/sa/productpage"]}}]}"#,
        r#"{"from":[{"source":{"namespaces":["default"]}}]}"#,
        r#"{"from":[{"source":{"notNamespaces":["foo","bar"]}}]}"#,
        r#"{"from":[{"source":{"serviceAccounts":["default/productpage"]}}]}"#,
        r#"{"when":[{"key":"source.principal","values":["cluster.local/ns/default/sa/productpage"]}]}"#,
        r#"{"from":[{"source":{"namespaces":["def*"]}}],"to":[{"operation":{"ports":["8080","9000"]}}]}"#,
    ];
    let rule = RULES[version % RULES.len()];
    match version / RULES.len() % 4 {
        0 => authorization("guard", "DENY", rule),
        // The same document in block style.
        1 => format!(
            "# {version}\napiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata:\n  \
             name: guard\n  namespace: foo\nspec:\n  selector:\n    matchLabels:\n      app: httpbin\n  \
             action: DENY\n  rules:\n  - {rule}\n"
        ),
        2 => authorization(
            "guard",
            "DENY",
            &format!("{},{rule}", rule_from(r#""namespaces":["no-client"]"#)),
        ),
        _ => {
            let another = authorization(
                "guard-too",
                "ALLOW",
                &rule_from(r#""namespaces":["default"]"#),
            );
            format!("{another}\n---\n{}", authorization("guard", "DENY", rule))
        }
    }
}

/// Equivalent policies that allow `foo` and `bar`.
fn base(version: usize) -> String {
    const RULES: [&str; 5] = [
        r#"{"from":[{"source":{"principals":["cluster.local/ns/foo/sa/curl","cluster.local/ns/bar/*"]}}]}"#,
        r#"{"from":[{"source":{"namespaces":["foo","bar"]}}]}"#,
        r#"{"from":[{"source":{"namespaces":["foo"]}}]},{"from":[{"source":{"principals":["*/bar/sa/curl"]}}]}"#,
        r#"{"from":[{"source":{"notNamespaces":["default"]}}]}"#,
        "{}",
    ];
    authorization("base", "ALLOW", RULES[version % RULES.len()])
}

/// A policy that changes no outcome: it allows what the guard denies, denies what no client opens,
/// or requires what every client fulfils.
fn other(index: usize, version: usize) -> String {
    let name = format!("other-{index}");
    let allow = |rule: &str| authorization(&name, "ALLOW", rule);
    let deny = |rule: &str| authorization(&name, "DENY", rule);
    match version % 16 {
        0 => allow(&rule_from(
            r#""principals":["cluster.local/ns/default/sa/productpage"]"#,
        )),
        1 => allow("{}"),
        2 => allow(""),
        3 => allow(&rule_from(r#""ipBlocks":["10.0.0.0/8","fd00::/8"]"#)),
        4 => allow(&rule_from(r#""ipBlocks":["10.0.0.0/8","fd00:::/8"]"#)),
        5 => allow(r#"{"to":[{"operation":{"methods":["GET"]}}]}"#),
        6 => deny(&rule_from(r#""namespaces":["no-client"]"#)),
        7 => deny(r#"{"to":[{"operation":{"ports":["1"]}}]}"#),
        8 => deny(&rule_from(r#""ipBlocks":["192.0.2.0/24"]"#)),
        9 => deny(&rule_from(r#""notPrincipals":["*"]"#)),
        10 => policy("PeerAuthentication", &name, r#"{"mtls":{"mode":"STRICT"}}"#),
        11 => policy(
            "PeerAuthentication",
            &name,
            r#"{"mtls":{"mode":"PERMISSIVE"}}"#,
        ),
        12 => policy(
            "NetworkPolicy",
            &name,
            r#"{"podSelector":{},"ingress":[{}]}"#,
        ),
        13 => policy(
            "NetworkPolicy",
            &name,
            r#"{"podSelector":{"matchLabels":{"flip":"yes"}},"ingress":[{"from":[{"namespaceSelector":{}}]}]}"#,
        ),
        14 => policy(
            "AuthorizationPolicy",
            &name,
            r#"{"selector":{"matchLabels":{"flip":"yes"}},"action":"DENY","rules":[{"from":[{"source":{"notNamespaces":["foo","bar"]}}]}]}"#,
        ),
        _ => policy(
            "AuthorizationPolicy",
            &name,
            "{\"action\":\"DENY\",\"rules\":[{}]}",
        )
        .replace(
            "\"namespace\"",
            "\"annotations\":{\"istio.io/dry-run\":\"true\"},\"namespace\"",
        ),
    }
}

/// The addresses of the denied client, which nginx must never log.
///
/// # Errors
/// The pod does not exist.
pub fn denied_addresses(lab: &Lab) -> Result<Vec<String>> {
    let address = |family| Ok(lab.pod_ip(PRODUCTPAGE, family)?.to_string());
    IpFamily::ALL.into_iter().map(address).collect()
}

/// The requests from these addresses in a server's own log.
///
/// # Errors
/// The pod does not exist.
pub fn requests_from(lab: &Lab, server: &str, addresses: &[String]) -> Result<Vec<String>> {
    let log = lab.pod_log(server)?;
    let is_from = |line: &&str| {
        let client = line.split(' ').next().unwrap_or_default();
        addresses.iter().any(|address| address == client)
    };
    Ok(log.lines().filter(is_from).map(str::to_owned).collect())
}
