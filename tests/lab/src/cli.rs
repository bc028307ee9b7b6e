//! The command line of `lab`.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use crate::lab::Lab;
use crate::location::Location;
use crate::options::{IdentitySource, Options};
use crate::process;
use crate::protocol::{ProgramState, Status};
use crate::registry::{self, LabDir};
use crate::{agent, demo, lifecycle, tools};

/// Daemons read applied objects within tens of milliseconds; the rest is for a busy machine.
const APPLY_TIMEOUT: Duration = Duration::from_secs(15);

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
    /// Bring a lab up from manifests and leave it running.
    Up {
        /// A folder of *.yaml files, or one file.
        manifests: PathBuf,
        /// Run no mesh daemons: every pod starts at once, unmeshed.
        #[arg(long)]
        no_daemon: bool,
        /// An extra argument for every daemon; may be repeated.
        #[arg(long = "daemon-arg", allow_hyphen_values = true)]
        daemon_args: Vec<String>,
        /// An extra argument for the daemon of one node; may be repeated.
        #[arg(long = "node-arg", value_name = "NODE=ARG", value_parser = parse_node_arg)]
        node_args: Vec<(String, String)>,
        /// Where identities come from: `folder`, a certificate authority whose key every daemon has;
        /// `ca`, an `ambit ca` outside the cluster; `spire:SOCKET`, a SPIRE agent.
        #[arg(long, value_parser = parse_identity_source, default_value = "folder")]
        identity: IdentitySource,
        /// An extra argument for `ambit ca`; may be repeated.
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
    /// Show the nodes, pods and services of the lab and their state.
    Status,
    /// Print the log of a node's daemon, a pod or the certificate authority; without a name, all logs.
    Logs {
        /// A node's or a pod's name, or `ca`.
        source: Option<String>,
    },
    /// Start a program that does not run.
    Start {
        /// `ca`, or `node/NAME` for its daemon.
        program: ControlledProgram,
    },
    /// Stop a program with SIGTERM; it stays stopped until `start`.
    Stop {
        /// `ca`, or `node/NAME` for its daemon.
        program: ControlledProgram,
    },
    /// Stop a program with SIGKILL; it stays stopped until `start`.
    Kill {
        /// `ca`, or `node/NAME` for its daemon.
        program: ControlledProgram,
    },
    /// Create or update the objects of a file or folder; returns when every daemon has read them.
    Apply {
        /// A folder of *.yaml files, or one file.
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
        /// Remove every lab on this machine.
        #[arg(long)]
        all: bool,
    },
    /// Show that the mesh encrypts and identifies traffic; fail if it does not.
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
enum ControlledProgram {
    Ca,
    Daemon(String),
}

impl FromStr for ControlledProgram {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            None if text == "ca" => Ok(Self::Ca),
            Some(("node", node)) => Ok(Self::Daemon(node.to_owned())),
            _ => Err("ca or node/NAME".to_owned()),
        }
    }
}

fn parse_identity_source(text: &str) -> Result<IdentitySource, String> {
    match text.split_once(':') {
        None if text == "folder" => Ok(IdentitySource::Folder),
        None if text == "ca" => Ok(IdentitySource::Ca),
        Some(("spire", socket)) => Ok(IdentitySource::Spire(socket.into())),
        _ => Err("folder, ca or spire:SOCKET".to_owned()),
    }
}

fn parse_node_arg(text: &str) -> Result<(String, String), String> {
    let (node, arg) = text.split_once('=').ok_or("NODE=ARG")?;
    Ok((node.to_owned(), arg.to_owned()))
}

/// Runs the command line. The exit code is 1 after an error, which is printed as one line.
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
        Command::Status => print_status(&Lab::attach(name)?.status()?),
        Command::Start { program } => match (Lab::attach(name)?, program) {
            (lab, ControlledProgram::Ca) => lab.start_ca()?,
            (lab, ControlledProgram::Daemon(node)) => lab.start_daemon(&node)?,
        },
        Command::Stop { program } => match (Lab::attach(name)?, program) {
            (lab, ControlledProgram::Ca) => lab.stop_ca()?,
            (lab, ControlledProgram::Daemon(node)) => lab.stop_daemon(&node)?,
        },
        Command::Kill { program } => match (Lab::attach(name)?, program) {
            (lab, ControlledProgram::Ca) => lab.kill_ca()?,
            (lab, ControlledProgram::Daemon(node)) => lab.kill_daemon(&node)?,
        },
        Command::Logs { source } => logs(name, source.as_deref())?,
        Command::Apply { manifests } => {
            let lab = Lab::attach(name)?;
            lab.apply(manifests)?;
            lab.wait_ready()?;
            lab.wait_applied(APPLY_TIMEOUT)?;
            print_status(&lab.status()?);
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
    // Until here, Ctrl-C removes the lab. A lab that is not ready stays, for inspection.
    let ready = lab.wait_ready();
    print_status(&lab.status()?);
    println!();
    let option = if name == "default" {
        String::new()
    } else {
        format!(" --name {name}")
    };
    println!("lab exec{option} POD -- CMD runs in a pod; lab down{option} removes it all");
    lab.keep()?;
    ready
}

/// Replaces this process with the command; returns only on failure.
fn exec(name: &str, pod: &str, command: &[String]) -> anyhow::Error {
    let location = match pod.split_once('/') {
        _ if pod == "fabric" => Location::Fabric,
        Some(("node", node)) => Location::node(node),
        _ => Location::pod(pod),
    };
    let info = Lab::attach(name).and_then(|lab| lab.exec_info(&location));
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    match info {
        Ok(info) => {
            anyhow::Error::new(process::command(&info, &words).exec()).context("ip netns exec")
        }
        Err(error) => error,
    }
}

fn logs(name: &str, source: Option<&str>) -> Result<()> {
    let lab = Lab::attach(name)?;
    let status = lab.status()?;
    let Some(source) = source else {
        return all_logs(&lab, &status);
    };
    match status.node(source) {
        Err(_) if source == "ca" && status.ca.is_some() => print!("{}", lab.ca_log()?),
        Ok(node) if node.daemon == ProgramState::Disabled => bail!("node {source} runs no daemon"),
        Ok(_) => print!("{}", lab.daemon_log(source)?),
        Err(_) => print!("{}", lab.pod_log(source)?),
    }
    Ok(())
}

fn all_logs(lab: &Lab, status: &Status) -> Result<()> {
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
    Ok(())
}

fn down(name: &str, all: bool) -> Result<()> {
    if !all {
        let dir = LabDir::new(name)?;
        if !dir.root().exists() {
            bail!("no lab {name} is up");
        }
        lifecycle::take_down(&dir)?;
        return registry::remove_orphaned_labs().map(drop);
    }
    for dir in registry::all()? {
        lifecycle::take_down(&dir)?;
        println!("lab {} is down", dir.name());
    }
    Ok(())
}

fn print_status(status: &Status) {
    println!("lab {}, files in {}", status.name, status.dir.display());
    if let Some(ca) = &status.ca {
        println!(
            "ca   {:<59} {}",
            ca.address.to_string(),
            state_text(&ca.state)
        );
    }
    for node in &status.nodes {
        let daemon = match &node.daemon {
            ProgramState::Disabled => "no daemon".to_owned(),
            other => format!("daemon {}", state_text(other)),
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

fn state_text(state: &ProgramState) -> &str {
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
