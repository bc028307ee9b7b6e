//! The command line.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};

use crate::capture::Where;
use crate::lab::Lab;
use crate::options::Options;
use crate::process;
use crate::protocol::{DaemonState, Status};
use crate::registry::{self, LabDir};
use crate::{agent, demo, tools};

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
    /// The log of a node's daemon or of a pod; without a name, of all.
    Logs {
        /// A node's or a pod's name.
        of: Option<String>,
    },
    /// Create or update the objects of a file or folder.
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
        } => up(name, manifests, no_daemon, daemon_args)?,
        Command::Exec { pod, command } => return Err(exec(name, &pod, &command)),
        Command::Status => print(&Lab::attach(name)?.status()?),
        Command::Logs { of } => logs(name, of.as_deref())?,
        Command::Apply { manifests } => {
            let lab = Lab::attach(name)?;
            lab.apply(manifests)?;
            lab.wait_ready()?;
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

fn up(name: &str, manifests: PathBuf, no_daemon: bool, daemon_args: Vec<String>) -> Result<()> {
    let options = Options {
        name: Some(name.to_owned()),
        daemon: !no_daemon,
        daemon_args,
        wait: false,
        ..Options::default()
    };
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
        _ if pod == "fabric" => Where::Bridge,
        Some(("node", node)) => Where::node(node),
        _ => Where::pod(pod),
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
        for node in status
            .nodes
            .iter()
            .filter(|node| node.daemon != DaemonState::Off)
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
        Ok(node) if node.daemon == DaemonState::Off => bail!("node {of} runs no daemon"),
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
        return registry::sweep().map(drop);
    }
    for dir in registry::all()? {
        registry::take_down(&dir)?;
        println!("lab {} is down", dir.name());
    }
    Ok(())
}

fn print(status: &Status) {
    println!("lab {}, files in {}", status.name, status.dir.display());
    for node in &status.nodes {
        let daemon = match &node.daemon {
            DaemonState::Off => "no daemon".to_owned(),
            DaemonState::Starting => "daemon starting".to_owned(),
            DaemonState::Ready => "daemon ready".to_owned(),
            DaemonState::Exited(how) => format!("daemon {how}"),
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

fn list(ips: &[std::net::IpAddr]) -> String {
    ips.iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" ")
}
