//! Policies that are edited without a pause, and clients that must not notice.
//!
//! One file holds the policy that denies [`PRODUCTPAGE`] and is there throughout; another the one
//! that allows [`FOO`] and [`BAR`](super::fixture::BAR). Both are written again and again: in other
//! words that mean the same, broken, half. Around them policies of all kinds come and go, none of
//! which may change what those two say together.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fastrand::Rng;
use lab::{IpFamily, Lab, Location, Process};

use super::connection::GREETED;
use super::fixture::{HTTP, PRODUCTPAGE, SERVERS, TCP};
use crate::input::SourceFile;

/// Requests per second of each [`Prober`].
const RATE: &str = "40/s";

/// How many files there are beside the two.
const OTHERS: usize = 6;

const GUARD: &str = "guard.yaml";
const BASE: &str = "base.yaml";

/// One client that asks one server again and again, over a connection of its own each time.
#[derive(Debug)]
pub struct Prober {
    curl: Process,
    /// What it is, for the reader of an error.
    pub name: String,
}

impl Prober {
    /// One for each server and family.
    ///
    /// # Errors
    /// A pod is missing.
    pub fn of(lab: &Lab, from: &str) -> Result<Vec<Self>> {
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
        let told = "%{stderr}%{exitcode}\n";
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
            told,
            "-o",
            "/dev/null",
            &url,
        ];
        Ok(Self {
            curl: lab.spawn_in(&Location::pod(from), &command)?,
            name: format!("{from} -> {to} ({family:?})"),
        })
    }

    /// curl's exit codes so far.
    pub fn ends(&self) -> Vec<u8> {
        let said = String::from_utf8_lossy(&self.curl.stderr()).into_owned();
        // The last line may be half of one.
        let complete = said.rsplit_once('\n').map_or("", |(complete, _)| complete);
        complete
            .lines()
            .map(|code| code.parse().unwrap_or(u8::MAX))
            .collect()
    }

    /// Stops it, and returns how many connections it made, all of which ended in one of these ways.
    ///
    /// # Errors
    /// One ended otherwise.
    pub fn finish(self, ways: &[u8]) -> Result<usize> {
        let ends = self.ends();
        let wrong: Vec<_> = ends
            .iter()
            .enumerate()
            .filter(|(_, end)| !ways.contains(end))
            .collect();
        ensure!(
            wrong.is_empty(),
            "{}: {} of {} ended otherwise than in {ways:?}: {:?}...",
            self.name,
            wrong.len(),
            ends.len(),
            &wrong[..wrong.len().min(10)]
        );
        Ok(ends.len())
    }
}

/// Connections one after the other to a server that speaks first; what it says is collected.
#[derive(Debug)]
pub struct Listener {
    bash: Process,
    /// What it is, for the reader of an error.
    pub name: String,
}

impl Listener {
    /// One for each server and family.
    ///
    /// # Errors
    /// A pod is missing.
    pub fn of(lab: &Lab, from: &str) -> Result<Vec<Self>> {
        let mut listeners = Vec::new();
        for (to, _) in SERVERS {
            for family in IpFamily::ALL {
                let address = SocketAddr::new(lab.pod_ip(to, family)?, TCP);
                let (ip, port) = (address.ip().to_string(), address.port().to_string());
                let script = format!("while :; do ( {GREETED} ); sleep 0.1; done");
                listeners.push(Self {
                    bash: lab.spawn(from, &["bash", "-c", &script, &ip, &port])?,
                    name: format!("{from} -> {to} ({family:?})"),
                });
            }
        }
        Ok(listeners)
    }

    /// Stops it, and returns how many connections it made, of which each was reset without a word.
    ///
    /// # Errors
    /// The server said something, or a connection ended otherwise.
    pub fn finish(self) -> Result<usize> {
        let heard = self.bash.stdout();
        ensure!(
            heard.is_empty(),
            "{} heard {} bytes",
            self.name,
            heard.len()
        );
        let said = String::from_utf8_lossy(&self.bash.stderr()).to_lowercase();
        // The last line may be half of one.
        let said = said.rsplit_once('\n').map_or("", |(complete, _)| complete);
        let otherwise: Vec<_> = said
            .lines()
            .filter(|line| !line.contains("reset by peer"))
            .take(10)
            .collect();
        ensure!(otherwise.is_empty(), "{}: {otherwise:?}", self.name);
        Ok(said.lines().count())
    }
}

/// The files that are edited.
#[derive(Debug)]
pub struct PolicyChurn {
    guard: SourceFile,
    base: SourceFile,
    others: Vec<Option<SourceFile>>,
    random: Rng,
    /// What was done, for the reader of an error.
    edits: Vec<String>,
}

impl PolicyChurn {
    /// Writes the two policies that stay.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn begin(lab: &Lab, seed: u64) -> Result<Self> {
        Ok(Self {
            guard: SourceFile::write(lab, GUARD, guard(0))?,
            base: SourceFile::write(lab, BASE, base(0))?,
            others: (0..OTHERS).map(|_| None).collect(),
            random: Rng::with_seed(seed),
            edits: Vec::new(),
        })
    }

    /// So many edits per second, for so long; returns how many there were.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn rage(&mut self, lab: &Lab, per_second: u32, lasts: Duration) -> Result<usize> {
        let (start, pause) = (Instant::now(), Duration::from_secs(1) / per_second);
        let mut due = start;
        while start.elapsed() < lasts {
            self.edit(lab)?;
            due += pause;
            // The pace of the load, not a wait for something.
            std::thread::park_timeout(due.saturating_duration_since(Instant::now()));
        }
        Ok(self.edits.len())
    }

    /// The last edits.
    pub fn last_edits(&self) -> &[String] {
        &self.edits[self.edits.len().saturating_sub(20)..]
    }

    fn edit(&mut self, lab: &Lab) -> Result<()> {
        let did = match self.random.u8(..100) {
            0..30 => rewrite(&self.guard, guard, &mut self.random)?,
            30..50 => rewrite(&self.base, base, &mut self.random)?,
            50..96 => self.edit_other(lab)?,
            _ => self.edit_labels(lab)?,
        };
        self.edits.push(did);
        Ok(())
    }

    /// A file of a policy that is not needed is written, written anew, or removed.
    fn edit_other(&mut self, lab: &Lab) -> Result<String> {
        let index = self.random.usize(..OTHERS);
        let file = format!("other-{index}.yaml");
        if self.others[index].is_some() && self.random.u8(..3) == 0 {
            self.others[index] = None;
            return Ok(format!("{file} removed"));
        }
        let text = other(index, self.random.usize(..));
        let did = format!("{file} {text}");
        match &self.others[index] {
            Some(other) => other.replace(text)?,
            None => self.others[index] = Some(SourceFile::write(lab, &file, text)?),
        }
        Ok(did)
    }

    /// A label that some of the policies select by.
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

    /// Leaves every file whole, and all that are still there as they are.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn settle(&self) -> Result<()> {
        self.guard.replace(guard(0))?;
        self.base.replace(base(0))?;
        for (index, other) in self.others.iter().enumerate() {
            if let Some(file) = other {
                // None of these is the broken one, of which a fresh daemon has no earlier version.
                file.replace(self::other(index, index + 5))?;
            }
        }
        Ok(())
    }
}

/// Writes one of the versions of a policy in one of the ways in which files are written.
fn rewrite(file: &SourceFile, version: fn(usize) -> String, random: &mut Rng) -> Result<String> {
    let text = match random.u8(..10) {
        0..7 => version(random.usize(..)),
        _ => broken(&version(0), random),
    };
    match random.u8(..10) {
        // In one line and in JSON no part of it is a whole.
        0..2 => file.overwrite(version(0))?,
        2 => {
            file.overwrite("")?;
            file.replace(&text)?;
        }
        _ => file.replace(&text)?,
    }
    Ok(text)
}

/// A version that nobody can take for good: a daemon keeps the last good one.
fn broken(json: &str, random: &mut Rng) -> String {
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

/// A policy in `foo` in one line of JSON.
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

fn from(source: &str) -> String {
    format!("{{\"from\":[{{\"source\":{{{source}}}}}]}}")
}

/// Denies [`PRODUCTPAGE`], and neither `foo` nor `bar`, in many words.
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
        // The same document, written as people do.
        1 => format!(
            "# {version}\napiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\nmetadata:\n  \
             name: guard\n  namespace: foo\nspec:\n  selector:\n    matchLabels:\n      app: httpbin\n  \
             action: DENY\n  rules:\n  - {rule}\n"
        ),
        2 => authorization(
            "guard",
            "DENY",
            &format!("{},{rule}", from(r#""namespaces":["nobody"]"#)),
        ),
        _ => {
            let another = authorization("guard-too", "ALLOW", &from(r#""namespaces":["default"]"#));
            format!("{another}\n---\n{}", authorization("guard", "DENY", rule))
        }
    }
}

/// Allows `foo` and `bar`, in many words.
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

/// A policy that changes nothing of what the two say: it allows what is denied, denies what nobody
/// asks, or asks for what everybody has.
fn other(index: usize, version: usize) -> String {
    let name = format!("other-{index}");
    let allow = |rule: &str| authorization(&name, "ALLOW", rule);
    let deny = |rule: &str| authorization(&name, "DENY", rule);
    match version % 16 {
        0 => allow(&from(
            r#""principals":["cluster.local/ns/default/sa/productpage"]"#,
        )),
        1 => allow("{}"),
        2 => allow(""),
        3 => allow(&from(r#""ipBlocks":["10.0.0.0/8","fd00::/8"]"#)),
        4 => allow(&from(r#""ipBlocks":["10.0.0.0/8","fd00:::/8"]"#)),
        5 => allow(r#"{"to":[{"operation":{"methods":["GET"]}}]}"#),
        6 => deny(&from(r#""namespaces":["nobody"]"#)),
        7 => deny(r#"{"to":[{"operation":{"ports":["1"]}}]}"#),
        8 => deny(&from(r#""ipBlocks":["192.0.2.0/24"]"#)),
        9 => deny(&from(r#""notPrincipals":["*"]"#)),
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

/// The address that nginx must never log, over each family.
///
/// # Errors
/// There is no such pod.
pub fn denied_addresses(lab: &Lab) -> Result<Vec<String>> {
    let address = |family| Ok(lab.pod_ip(PRODUCTPAGE, family)?.to_string());
    IpFamily::ALL.into_iter().map(address).collect()
}

/// Lines of a server's own log that are requests from one of these addresses.
///
/// # Errors
/// There is no such pod.
pub fn requests_from(lab: &Lab, server: &str, addresses: &[String]) -> Result<Vec<String>> {
    let log = lab.pod_log(server)?;
    let from = |line: &&str| {
        let client = line.split(' ').next().unwrap_or_default();
        addresses.iter().any(|address| address == client)
    };
    Ok(log.lines().filter(from).map(str::to_owned).collect())
}
