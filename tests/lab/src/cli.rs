//! The command line.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use crate::capture::Location;
use crate::lab::Lab;
use crate::options::{IdentitySource, Options};
use crate::process;
use crate::protocol::{ProgramState, Status};
use crate::registry::{self, LabDir};
use crate::{agent, demo, tools};

/// Daemons read what was applied within tens of milliseconds; this leaves room for a busy machine.
const READ: Duration = Duration::from_secs(15);

/// Nodes and pods as network namespaces, from Kubernetes manifests.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Cli {
    /// The lab's name. [default: default; of the demo: demo]
    #[arg(long, global = true)]
    name: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Bring a lab up from the manifests in a folder, and leave it running.
    Up {
        /// A folder of *.yaml, or one file.
        manifests: PathBuf,
        /// Without mesh daemons: every pod starts at once, unmeshed.
        #[arg(long)]
        no_daemon: bool,
        /// One more argument for every daemon; may be repeated.
        #[arg(long = "daemon-arg", allow_hyphen_values = true)]
        daemon_args: Vec<String>,
        /// One more argument for the daemon of one node; may be repeated.
        #[arg(long = "node-arg", value_name = "NODE=ARG", value_parser = of_node)]
        node_args: Vec<(String, String)>,
        /// Where identities come from: `folder`, a certificate authority that the daemons have the key
        /// of; `ca`, an `ambit ca` outside the cluster; `spire:SOCKET`, an agent of SPIRE.
        #[arg(long, value_parser = identity, default_value = "folder")]
        identity: IdentitySource,
        /// One more argument for `ambit ca`; may be repeated.
        #[arg(long = "ca-arg", allow_hyphen_values = true)]
        ca_args: Vec<String>,
    },
    /// Run a command in a pod (`node/NAME`: in a node; `fabric`: outside the cluster).
    Exec {
        /// The pod's name, or namespace/name.
        pod: String,
        /// The command and its arguments, after `--`.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// What runs where, and how it is.
    Status,
    /// The log of a node's daemon, of a pod or of the certificate authority; without a name, of all.
    Logs {
        /// A node's or a pod's name, or `ca`.
        of: Option<String>,
    },
    /// Start a program that does not run.
    Start {
        /// `ca`, or `node/NAME` for its daemon.
        program: Kept,
    },
    /// End a program with SIGTERM; it stays down until it is started.
    Stop {
        /// `ca`, or `node/NAME` for its daemon.
        program: Kept,
    },
    /// End a program with SIGKILL; it stays down until it is started.
    Kill {
        /// `ca`, or `node/NAME` for its daemon.
        program: Kept,
    },
    /// Create or update the objects of a file or folder; returns when every daemon has read them.
    Apply {
        /// A folder of *.yaml, or one file.
        manifests: PathBuf,
    },
    /// Delete an object.
    Delete {
        /// Pod, Service, Namespace, ...
        kind: String,
        /// Its name, or namespace/name.
        object: String,
    },
    /// Remove the lab.
    Down {
        /// Every lab on this machine.
        #[arg(long)]
        all: bool,
    },
    /// Show the mesh at work, and fail if it does not.
    Demo {
        /// The folder of the demo's manifests.
        #[arg(long, default_value = "deploy/demo")]
        manifests: PathBuf,
        /// Leave the lab running.
        #[arg(long)]
        keep: bool,
    },
    /// The process that owns a lab; started by `up`.
    #[command(hide = true)]
    Agent {
        #[arg(long)]
        options: String,
    },
}

/// A program that can be stopped and started.
#[derive(Debug, Clone)]
enum Kept {
    Ca,
    Daemon(String),
}

impl FromStr for Kept {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            None if text == "ca" => Ok(Self::Ca),
            Some(("node", node)) => Ok(Self::Daemon(node.to_owned())),
            _ => Err("ca or node/NAME".to_owned()),
        }
    }
}

fn identity(text: &str) -> Result<IdentitySource, String> {
    match text.split_once(':') {
        None if text == "folder" => Ok(IdentitySource::Folder),
        None if text == "ca" => Ok(IdentitySource::Ca),
        Some(("spire", socket)) => Ok(IdentitySource::Spire(socket.into())),
        _ => Err("folder, ca or spire:SOCKET".to_owned()),
    }
}

fn of_node(text: &str) -> Result<(String, String), String> {
    let (node, arg) = text.split_once('=').ok_or("NODE=ARG")?;
    Ok((node.to_owned(), arg.to_owned()))
}

/// Runs the command line and says how it ended: 1 after an error, which is printed as one line.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let name = cli.name.as_deref().unwrap_or("default");
    if let Command::Agent { options } = &cli.command {
        agent::run(name, serde_json::from_str(options).context("options")?)?;
        return Ok(ExitCode::SUCCESS);
    }
    tools::check()?;
    match cli.command {
        Command::Up {
            manifests,
            no_daemon,
            daemon_args,
            node_args,
            identity,
            ca_args,
        } => {
            let mut options = Options {
                name: Some(name.to_owned()),
                run_daemons: !no_daemon,
                daemon_args,
                identity,
                wait_until_ready: false,
                ..Options::default()
            };
            options.ca_launch.args = ca_args;
            for (node, arg) in node_args {
                options.node_launch.entry(node).or_default().args.push(arg);
            }
            up(name, manifests, options)?;
        }
        Command::Exec { pod, command } => return Err(exec(name, &pod, &command)),
        Command::Status => print(&Lab::attach(name)?.status()?),
        Command::Start { program } => match (Lab::attach(name)?, program) {
            (lab, Kept::Ca) => lab.start_ca()?,
            (lab, Kept::Daemon(node)) => lab.start_daemon(&node)?,
        },
        Command::Stop { program } => match (Lab::attach(name)?, program) {
            (lab, Kept::Ca) => lab.stop_ca()?,
            (lab, Kept::Daemon(node)) => lab.stop_daemon(&node)?,
        },
        Command::Kill { program } => match (Lab::attach(name)?, program) {
            (lab, Kept::Ca) => lab.kill_ca()?,
            (lab, Kept::Daemon(node)) => lab.kill_daemon(&node)?,
        },
        Command::Logs { of } => logs(name, of.as_deref())?,
        Command::Apply { manifests } => {
            let lab = Lab::attach(name)?;
            lab.apply(manifests)?;
            lab.wait_ready()?;
            lab.wait_applied(READ)?;
            print(&lab.status()?);
        }
        Command::Delete { kind, object } => Lab::attach(name)?.delete(&kind, &object)?,
        Command::Down { all } => down(name, all)?,
        Command::Demo { manifests, keep } => {
            return demo::run(cli.name.as_deref(), manifests, keep);
        }
        Command::Agent { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn up(name: &str, manifests: PathBuf, options: Options) -> Result<()> {
    let lab = Lab::up(manifests, options)?;
    // Ctrl-C until here removes it; what has not settled stays, to be looked at.
    let settled = lab.wait_ready();
    print(&lab.status()?);
    println!();
    let option = if name == "default" {
        String::new()
    } else {
        format!(" --name {name}")
    };
    println!("lab exec{option} POD -- CMD runs in a pod; lab down{option} removes it all");
    lab.keep()?;
    settled
}

/// Becomes the command; returns only if that fails.
fn exec(name: &str, pod: &str, command: &[String]) -> anyhow::Error {
    let place = match pod.split_once('/') {
        _ if pod == "fabric" => Location::Fabric,
        Some(("node", node)) => Location::node(node),
        _ => Location::pod(pod),
    };
    let info = Lab::attach(name).and_then(|lab| lab.exec_info(&place));
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    match info {
        Ok(info) => {
            anyhow::Error::new(process::command(&info, &words).exec()).context("ip netns exec")
        }
        Err(error) => error,
    }
}

fn logs(name: &str, of: Option<&str>) -> Result<()> {
    let lab = Lab::attach(name)?;
    let status = lab.status()?;
    let Some(of) = of else {
        if status.ca.is_some() {
            println!("certificate authority\n{}", lab.ca_log()?);
        }
        for node in status
            .nodes
            .iter()
            .filter(|node| node.daemon != ProgramState::Disabled)
        {
            println!("node {}\n{}", node.name, lab.daemon_log(&node.name)?);
        }
        for pod in &status.pods {
            let pod = format!("{}/{}", pod.namespace, pod.name);
            println!("pod {pod}\n{}", lab.pod_log(&pod).unwrap_or_default());
        }
        return Ok(());
    };
    match status.node(of) {
        Err(_) if of == "ca" && status.ca.is_some() => print!("{}", lab.ca_log()?),
        Ok(node) if node.daemon == ProgramState::Disabled => bail!("node {of} runs no daemon"),
        Ok(_) => print!("{}", lab.daemon_log(of)?),
        Err(_) => print!("{}", lab.pod_log(of)?),
    }
    Ok(())
}

fn down(name: &str, all: bool) -> Result<()> {
    if !all {
        let dir = LabDir::new(name)?;
        if !dir.root().exists() {
            bail!("no lab {name} is up");
        }
        registry::take_down(&dir)?;
        return registry::remove_dead_labs().map(drop);
    }
    for dir in registry::all()? {
        registry::take_down(&dir)?;
        println!("lab {} is down", dir.name());
    }
    Ok(())
}

fn print(status: &Status) {
    println!("lab {}, files in {}", status.name, status.dir.display());
    if let Some(ca) = &status.ca {
        println!("ca   {:<59} {}", ca.address.to_string(), state(&ca.state));
    }
    for node in &status.nodes {
        let daemon = match &node.daemon {
            ProgramState::Disabled => "no daemon".to_owned(),
            other => format!("daemon {}", state(other)),
        };
        println!(
            "node {:<24} {:<34} {daemon}",
            node.name,
            list(&node.addresses)
        );
    }
    for pod in &status.pods {
        let name = format!("{}/{}", pod.namespace, pod.name);
        let mesh = if pod.meshed { "meshed" } else { "plain" };
        let ready = if pod.ready { "ready" } else { "not ready" };
        let (ips, node, phase, message) = (list(&pod.ips), &pod.node, &pod.phase, &pod.message);
        println!("pod  {name:<24} {ips:<34} on {node}, {mesh}, {phase}, {ready} {message}");
    }
    for service in &status.services {
        let name = format!("{}/{}", service.namespace, service.name);
        let ips = match service.cluster_ips.as_slice() {
            [] => "headless".to_owned(),
            ips => list(ips),
        };
        println!("svc  {name:<24} {ips:<34} -> {}", list(&service.endpoints));
    }
}

fn state(state: &ProgramState) -> &str {
    match state {
        ProgramState::Disabled => "off",
        ProgramState::Starting => "starting",
        ProgramState::Ready => "ready",
        ProgramState::Exited(how) => how,
    }
}

fn list(ips: &[std::net::IpAddr]) -> String {
    ips.iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" ")
}
