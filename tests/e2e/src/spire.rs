//! A real SPIRE server, and an agent for each node of a lab.
//!
//! They run outside the lab, on loopback and on sockets in a folder of the test. An agent is configured as in
//! production: it joins with a token, keeps its key on disk, attests the daemon by the path of its executable, and
//! serves it the Delegated Identity API because the daemon's identity is an authorized delegate.

mod programs;

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use lab::{IdentitySource, LaunchOptions, Options};
use serde_json::Value;
use tempfile::TempDir;

use crate::programs::ztunnel_binary;
use programs::{Program, run};

/// The trust domain, which is the daemons' default.
const TRUST_DOMAIN: &str = "cluster.local";

/// The daemons' own identity in SPIRE.
const DAEMON_ID: &str = "spiffe://cluster.local/ambit/ztunnel";

/// How long server or agent may take to start: less than a second on an idle machine.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// A running SPIRE server. Dropping the value kills it.
#[derive(Debug)]
pub struct SpireServer {
    folder: TempDir,
    port: u16,
    _server: Program,
}

/// The SPIRE agent of a node.
#[derive(Debug)]
pub struct SpireAgent {
    node: String,
    folder: PathBuf,
    running: Option<Program>,
}

impl SpireServer {
    /// Starts a server.
    ///
    /// # Errors
    /// SPIRE is not installed, or does not start; the error has its last message.
    pub fn start() -> Result<Self> {
        let folder = tempfile::tempdir().context("create a folder for SPIRE")?;
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
        wait_healthy("spire-server", &spire.socket())?;
        Ok(spire)
    }

    /// Starts the agent of a node and authorizes the node's daemon.
    ///
    /// # Errors
    /// The agent does not start.
    pub fn start_agent(&self, node: &str) -> Result<SpireAgent> {
        let agent = self.start_agent_without_delegate(node)?;
        self.authorize_daemon(node)?;
        Ok(agent)
    }

    /// Starts the agent of a node, which denies the node's daemon until [`Self::authorize_daemon`].
    ///
    /// # Errors
    /// The agent does not start.
    pub fn start_agent_without_delegate(&self, node: &str) -> Result<SpireAgent> {
        let folder = self.folder.path().join(node);
        fs::create_dir(&folder).context("create a folder for the agent")?;
        let token = self.call(&["token", "generate", "-spiffeID", &agent_id(node)])?;
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
        let mut agent = SpireAgent {
            node: node.to_owned(),
            folder,
            running: None,
        };
        agent.start()?;
        Ok(agent)
    }

    /// Registers the daemon of a node as an authorized delegate of its agent.
    ///
    /// # Errors
    /// The server refuses.
    pub fn authorize_daemon(&self, node: &str) -> Result<()> {
        let program = fs::canonicalize(ztunnel_binary()?)?;
        let path = format!("unix:path:{}", program.display());
        self.register(node, DAEMON_ID, &[&path], None).map(drop)
    }

    /// Registers a service account's identity on a node. Returns the entry id.
    ///
    /// # Errors
    /// The server refuses.
    pub fn register_workload(
        &self,
        node: &str,
        namespace: &str,
        account: &str,
        ttl: Option<Duration>,
    ) -> Result<String> {
        let id = format!("spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{account}");
        self.register(node, &id, &selectors(namespace, account), ttl)
    }

    /// Registers an identity that is not the pods' own for a service account. Returns the entry id.
    ///
    /// # Errors
    /// The server refuses.
    pub fn register_other_identity(
        &self,
        node: &str,
        namespace: &str,
        account: &str,
        id: &str,
    ) -> Result<String> {
        self.register(node, id, &selectors(namespace, account), None)
    }

    fn register(
        &self,
        node: &str,
        id: &str,
        selectors: &[impl AsRef<str>],
        ttl: Option<Duration>,
    ) -> Result<String> {
        let parent = agent_id(node);
        let mut words = vec!["entry", "create", "-parentID", &parent, "-spiffeID", id];
        for selector in selectors {
            words.extend(["-selector", selector.as_ref()]);
        }
        let ttl = ttl.map(|ttl| ttl.as_secs().to_string());
        if let Some(ttl) = &ttl {
            words.extend(["-x509SVIDTTL", ttl]);
        }
        let created = self.call(&words)?;
        let entry = created.pointer("/results/0/entry/id");
        let entry = entry.and_then(Value::as_str);
        entry.map(str::to_owned).context("entry id")
    }

    /// Deletes an entry.
    ///
    /// # Errors
    /// There is no such entry.
    pub fn delete_entry(&self, entry: &str) -> Result<()> {
        self.call(&["entry", "delete", "-entryID", entry]).map(drop)
    }

    fn call(&self, words: &[&str]) -> Result<Value> {
        let socket = self.socket();
        let mut words = words.to_vec();
        words.extend(["-socketPath", &socket, "-output", "json"]);
        serde_json::from_str(&run("spire-server", &words)?)
            .context("parse the output of spire-server")
    }

    fn socket(&self) -> String {
        self.folder.path().join("api.sock").display().to_string()
    }
}

impl SpireAgent {
    /// The socket of the Delegated Identity API.
    pub fn admin_socket(&self) -> PathBuf {
        self.folder.join("admin/admin.sock")
    }

    /// Starts the agent, or restarts it, and waits until it is healthy.
    ///
    /// # Errors
    /// The agent does not start.
    pub fn start(&mut self) -> Result<()> {
        self.running = None;
        self.running = Some(Program::start(
            "spire-agent",
            &self.folder.join("agent.conf"),
        )?);
        let socket = self.folder.join("api/agent.sock");
        wait_healthy("spire-agent", &socket.display().to_string())
    }

    /// Kills the agent (SIGKILL).
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// The selectors of all subscriptions since the first start.
    ///
    /// # Errors
    /// The agent's log cannot be read.
    pub fn subscribed_selectors(&self) -> Result<Vec<String>> {
        let log = fs::read_to_string(self.folder.join("agent.log"))?;
        let subscribed = log
            .lines()
            .filter(|line| line.contains("Subscribing to cache changes"))
            .filter_map(|line| Some(line.split_once("request_selectors=")?.1.to_owned()));
        Ok(subscribed.collect())
    }
}

/// Options of a lab whose daemons use these agents, each the one of its node.
pub fn lab_options<'a>(agents: impl IntoIterator<Item = &'a SpireAgent>) -> Options {
    let launch = |agent: &SpireAgent| {
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

/// The parent id of a node's entries. The join token gives it to the agent of that node.
fn agent_id(node: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/node/{node}")
}

fn selectors(namespace: &str, account: &str) -> [String; 2] {
    [format!("k8s:ns:{namespace}"), format!("k8s:sa:{account}")]
}

fn wait_healthy(program: &str, socket: &str) -> Result<()> {
    let mut error = None;
    let healthy = lab::wait_until(&format!("{program} to be healthy"), START_DEADLINE, || {
        error = run(program, &["healthcheck", "-socketPath", socket]).err();
        error.is_none().then_some(())
    });
    healthy.with_context(|| format!("last error: {error:?}"))
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

/// The agent polls for new entries every second instead of every five, so that tests wait less.
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
  authorized_delegates = ["{DAEMON_ID}"]
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
