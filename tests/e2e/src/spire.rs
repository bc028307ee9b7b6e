//! SPIRE itself: a server, and an agent for each node of a lab.
//!
//! They run outside the lab, on loopback and sockets in a folder of the test: what is between a
//! daemon and its agent is a socket in the file system. An agent is as an operator would have it: it
//! joined with a token, keeps its own key on disk, attests the daemon by the path of its program,
//! and lets it ask for others because its identity is among the authorized delegates.

mod programs;

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use lab::{IdentitySource, LaunchOptions, Options};
use serde_json::Value;
use tempfile::TempDir;

use crate::programs::ztunnel;
use programs::{Program, run};

/// The trust domain, which is the daemons' default.
const TRUST_DOMAIN: &str = "cluster.local";

/// Who the daemons are to SPIRE.
const DELEGATE: &str = "spiffe://cluster.local/ambit/ztunnel";

/// Both start in less than a second on a machine that has nothing else to do.
const START: Duration = Duration::from_secs(30);

/// A SPIRE server, for as long as this lives.
#[derive(Debug)]
pub struct Spire {
    folder: TempDir,
    port: u16,
    _server: Program,
}

/// The SPIRE agent of a node.
#[derive(Debug)]
pub struct Agent {
    node: String,
    folder: PathBuf,
    running: Option<Program>,
}

impl Spire {
    /// Starts a server.
    ///
    /// # Errors
    /// SPIRE is not installed, or does not start; the error has what it said.
    pub fn start() -> Result<Self> {
        let folder = tempfile::tempdir().context("a folder for SPIRE")?;
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("a free port")?;
        let port = free.local_addr()?.port();
        drop(free);
        let config = folder.path().join("server.conf");
        fs::write(&config, server_config(folder.path(), port))?;
        let server = Program::start("spire-server", &config)?;
        let spire = Self {
            folder,
            port,
            _server: server,
        };
        healthy("spire-server", &spire.socket())?;
        Ok(spire)
    }

    /// Starts the agent of a node, with the daemon as its delegate.
    ///
    /// # Errors
    /// It does not start.
    pub fn agent(&self, node: &str) -> Result<Agent> {
        let agent = self.lone_agent(node)?;
        self.delegate(node)?;
        Ok(agent)
    }

    /// Starts the agent of a node, to which the daemon is nobody.
    ///
    /// # Errors
    /// It does not start.
    pub fn lone_agent(&self, node: &str) -> Result<Agent> {
        let folder = self.folder.path().join(node);
        fs::create_dir(&folder).context("a folder for the agent")?;
        let token = self.ask(&["token", "generate", "-spiffeID", &alias(node)])?;
        let token = token["value"].as_str().context("a join token")?.to_owned();
        let bundle = run(
            "spire-server",
            &["bundle", "show", "-socketPath", &self.socket()],
        )?;
        fs::write(folder.join("bundle.pem"), bundle)?;
        fs::write(
            folder.join("agent.conf"),
            agent_config(&folder, self.port, &token),
        )?;
        let mut agent = Agent {
            node: node.to_owned(),
            folder,
            running: None,
        };
        agent.start()?;
        Ok(agent)
    }

    /// Makes the daemon of a node an authorized delegate of its agent.
    ///
    /// # Errors
    /// The server refuses.
    pub fn delegate(&self, node: &str) -> Result<()> {
        let program = fs::canonicalize(ztunnel()?)?;
        let path = format!("unix:path:{}", program.display());
        self.register(node, DELEGATE, &[&path], None).map(drop)
    }

    /// Registers a service account's identity on a node; what the id of the entry is.
    ///
    /// # Errors
    /// The server refuses.
    pub fn workload(
        &self,
        node: &str,
        namespace: &str,
        account: &str,
        ttl: Option<Duration>,
    ) -> Result<String> {
        let id = format!("spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{account}");
        self.register(node, &id, &selectors(namespace, account), ttl)
    }

    /// Registers another identity than the pods' own for a service account.
    ///
    /// # Errors
    /// The server refuses.
    pub fn impostor(&self, node: &str, namespace: &str, account: &str, id: &str) -> Result<String> {
        self.register(node, id, &selectors(namespace, account), None)
    }

    fn register(
        &self,
        node: &str,
        id: &str,
        selectors: &[impl AsRef<str>],
        ttl: Option<Duration>,
    ) -> Result<String> {
        let parent = alias(node);
        let mut words = vec!["entry", "create", "-parentID", &parent, "-spiffeID", id];
        for selector in selectors {
            words.extend(["-selector", selector.as_ref()]);
        }
        let ttl = ttl.map(|ttl| ttl.as_secs().to_string());
        if let Some(ttl) = &ttl {
            words.extend(["-x509SVIDTTL", ttl]);
        }
        let created = self.ask(&words)?;
        let entry = created.pointer("/results/0/entry/id");
        let entry = entry.and_then(Value::as_str);
        entry.map(str::to_owned).context("the id of an entry")
    }

    /// Removes an entry.
    ///
    /// # Errors
    /// There is no such entry.
    pub fn withdraw(&self, entry: &str) -> Result<()> {
        self.ask(&["entry", "delete", "-entryID", entry]).map(drop)
    }

    fn ask(&self, words: &[&str]) -> Result<Value> {
        let socket = self.socket();
        let mut words = words.to_vec();
        words.extend(["-socketPath", &socket, "-output", "json"]);
        serde_json::from_str(&run("spire-server", &words)?).context("what spire-server said")
    }

    fn socket(&self) -> String {
        self.folder.path().join("api.sock").display().to_string()
    }
}

impl Agent {
    /// Where it serves the Delegated Identity API.
    pub fn admin_socket(&self) -> PathBuf {
        self.folder.join("admin/admin.sock")
    }

    /// Starts it, again if it was killed, and waits until it serves.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(&mut self) -> Result<()> {
        self.running = None;
        self.running = Some(Program::start(
            "spire-agent",
            &self.folder.join("agent.conf"),
        )?);
        let socket = self.folder.join("api/agent.sock");
        healthy("spire-agent", &socket.display().to_string())
    }

    /// SIGKILL; it stays dead until it is started again.
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// The selectors of all subscriptions that were made since it was first started.
    ///
    /// # Errors
    /// Its log cannot be read.
    pub fn asked(&self) -> Result<Vec<String>> {
        let log = fs::read_to_string(self.folder.join("agent.log"))?;
        let asked = log
            .lines()
            .filter(|line| line.contains("Subscribing to cache changes"))
            .filter_map(|line| Some(line.split_once("request_selectors=")?.1.to_owned()));
        Ok(asked.collect())
    }
}

/// A lab whose daemons ask these agents, each the one of its node.
pub fn options<'a>(agents: impl IntoIterator<Item = &'a Agent>) -> Options {
    let launch = |agent: &Agent| {
        let socket = agent.admin_socket().display().to_string();
        (
            agent.node.clone(),
            LaunchOptions::args(&["--spire-socket", &socket]),
        )
    };
    Options {
        identity: IdentitySource::Custom,
        node_launch: agents.into_iter().map(launch).collect(),
        ..Options::default()
    }
}

/// The identity that stands for whichever agent runs on a node.
fn alias(node: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/node/{node}")
}

fn selectors(namespace: &str, account: &str) -> [String; 2] {
    [format!("k8s:ns:{namespace}"), format!("k8s:sa:{account}")]
}

fn healthy(program: &str, socket: &str) -> Result<()> {
    let mut said = None;
    let healthy = lab::wait_until(&format!("{program} to be healthy"), START, || {
        said = run(program, &["healthcheck", "-socketPath", socket]).err();
        said.is_none().then_some(())
    });
    healthy.with_context(|| format!("it said {said:?}"))
}

fn server_config(folder: &Path, port: u16) -> String {
    let folder = folder.display();
    format!(
        r#"
server {{
  bind_address = "127.0.0.1"
  bind_port = "{port}"
  socket_path = "{folder}/api.sock"
  trust_domain = "{TRUST_DOMAIN}"
  data_dir = "{folder}"
  log_file = "{folder}/server.log"
}}
plugins {{
  DataStore "sql" {{
    plugin_data {{ database_type = "sqlite3", connection_string = "{folder}/entries.sqlite3" }}
  }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory" {{ plugin_data {{}} }}
}}
"#
    )
}

/// The agent looks for new entries every second instead of every five, so that tests need not wait.
fn agent_config(folder: &Path, port: u16, token: &str) -> String {
    let folder = folder.display();
    format!(
        r#"
agent {{
  data_dir = "{folder}"
  log_level = "DEBUG"
  log_file = "{folder}/agent.log"
  server_address = "127.0.0.1"
  server_port = "{port}"
  socket_path = "{folder}/api/agent.sock"
  admin_socket_path = "{folder}/admin/admin.sock"
  trust_bundle_path = "{folder}/bundle.pem"
  trust_domain = "{TRUST_DOMAIN}"
  join_token = "{token}"
  authorized_delegates = ["{DELEGATE}"]
  experimental {{ sync_interval = "1s" }}
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "disk" {{ plugin_data {{ directory = "{folder}" }} }}
  WorkloadAttestor "unix" {{ plugin_data {{ discover_workload_path = true }} }}
}}
"#
    )
}
