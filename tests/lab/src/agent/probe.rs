//! The kubelet's probes. They come from the node's own address.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::time::sleep;

use super::kubelet::Pod;
use crate::http;
use crate::netns;

/// Until its first success a probe is repeated this often, not every `periodSeconds`: a pod is
/// ready as soon as its program is.
const FIRST_PERIOD: Duration = Duration::from_millis(50);

/// Watches a container. Says whether it is ready, whenever that changes, and returns when it must
/// be killed, with the reason.
pub(super) async fn watch(
    pod: &Pod,
    container: &Container,
    ready: &dyn Fn(bool, String),
) -> String {
    if let Some(probe) = &container.startup_probe {
        let patience = Timing::of(probe).patience();
        if tokio::time::timeout(patience, first_success(pod, container, probe))
            .await
            .is_err()
        {
            return format!(
                "startup probe of {} did not succeed within {patience:?}",
                container.name
            );
        }
        if container.readiness_probe.is_none() {
            ready(true, String::new());
        }
    }
    tokio::select! {
        never = readiness(pod, container, ready) => match never {},
        why = liveness(pod, container) => why,
    }
}

async fn readiness(
    pod: &Pod,
    container: &Container,
    ready: &dyn Fn(bool, String),
) -> std::convert::Infallible {
    let Some(probe) = &container.readiness_probe else {
        return std::future::pending().await;
    };
    let timing = Timing::of(probe);
    sleep(timing.delay).await;
    let (mut was, mut failures, mut successes) = (None, 0, 0);
    loop {
        match check(pod, container, probe, timing.timeout).await {
            Ok(()) => {
                (failures, successes) = (0, successes + 1);
                if was != Some(true) && successes >= timing.successes {
                    was = Some(true);
                    ready(true, String::new());
                }
            }
            Err(why) => {
                (failures, successes) = (failures + 1, 0);
                if was.is_none() || (was == Some(true) && failures >= timing.failures) {
                    was = Some(false);
                    ready(
                        false,
                        format!("readiness probe of {}: {why}", container.name),
                    );
                }
            }
        }
        // Once it has been ready, the declared period holds; before, it is found ready at once.
        sleep(if was == Some(true) || failures == 0 {
            timing.period
        } else {
            FIRST_PERIOD
        })
        .await;
    }
}

async fn liveness(pod: &Pod, container: &Container) -> String {
    let Some(probe) = &container.liveness_probe else {
        return std::future::pending().await;
    };
    let timing = Timing::of(probe);
    sleep(timing.delay).await;
    let mut failures = 0;
    loop {
        sleep(timing.period).await;
        failures = match check(pod, container, probe, timing.timeout).await {
            Ok(()) => 0,
            Err(why) if failures + 1 >= timing.failures => {
                return format!("liveness probe of {}: {why}", container.name);
            }
            Err(_) => failures + 1,
        };
    }
}

async fn first_success(pod: &Pod, container: &Container, probe: &Probe) {
    let timing = Timing::of(probe);
    sleep(timing.delay).await;
    while check(pod, container, probe, timing.timeout).await.is_err() {
        sleep(FIRST_PERIOD).await;
    }
}

/// Kubernetes' defaults.
struct Timing {
    delay: Duration,
    period: Duration,
    timeout: Duration,
    failures: u32,
    successes: u32,
}

impl Timing {
    fn of(probe: &Probe) -> Self {
        let number = |value: Option<i32>, default: u32| {
            value.and_then(|v| v.try_into().ok()).unwrap_or(default)
        };
        let seconds = |value, default| Duration::from_secs(number(value, default).into());
        Self {
            delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            failures: number(probe.failure_threshold, 3).max(1),
            successes: number(probe.success_threshold, 1).max(1),
        }
    }

    /// How long failures are borne from the start.
    fn patience(&self) -> Duration {
        self.delay + self.period * self.failures
    }
}

/// One attempt.
async fn check(
    pod: &Pod,
    container: &Container,
    probe: &Probe,
    timeout: Duration,
) -> Result<(), String> {
    let node = &pod.node_netns;
    if let Some(get) = &probe.http_get {
        let to = SocketAddr::new(
            address(pod, get.host.as_deref())?,
            port(container, &get.port)?,
        );
        let path = get.path.clone().unwrap_or_else(|| "/".to_owned());
        let headers: Vec<_> = get
            .http_headers
            .iter()
            .flatten()
            .map(|h| (h.name.clone(), h.value.clone()))
            .collect();
        let answer = move || http::get(to, &to.to_string(), &path, &headers, timeout);
        let answer = netns::inside_async(node, answer)
            .await
            .map_err(|error| format!("{error:#}"))?;
        return match answer
            .map_err(|error| format!("http://{to}: {error}"))?
            .status
        {
            200..=399 => Ok(()),
            status => Err(format!("http://{to}: status {status}")),
        };
    }
    if let Some(tcp) = &probe.tcp_socket {
        let to = SocketAddr::new(
            address(pod, tcp.host.as_deref())?,
            port(container, &tcp.port)?,
        );
        let connected =
            netns::inside_async(node, move || TcpStream::connect_timeout(&to, timeout)).await;
        let connected = connected.map_err(|error| format!("{error:#}"))?;
        return connected
            .map(drop)
            .map_err(|error| format!("{to}: {error}"));
    }
    match probe.exec.as_ref().and_then(|exec| exec.command.as_ref()) {
        Some(command) => exec(pod, container, command, timeout).await,
        None => Err("only httpGet, tcpSocket and exec are known".to_owned()),
    }
}

async fn exec(
    pod: &Pod,
    container: &Container,
    command: &[String],
    timeout: Duration,
) -> Result<(), String> {
    let mut process = tokio::process::Command::new("ip");
    process
        .args(["netns", "exec", &pod.entry.netns])
        .args(command)
        .envs(pod.environment(container));
    process
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    process.current_dir(pod.dir()).kill_on_drop(true);
    match tokio::time::timeout(timeout, process.status()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("exec: {status}")),
        Ok(Err(error)) => Err(format!("exec: {error}")),
        Err(_) => Err(format!("exec: not done within {timeout:?}")),
    }
}

fn address(pod: &Pod, host: Option<&str>) -> Result<IpAddr, String> {
    match host {
        Some(host) => host
            .parse()
            .map_err(|_| format!("host {host}: only addresses are known")),
        None => pod
            .entry
            .ips
            .first()
            .copied()
            .ok_or_else(|| "the pod has no address".to_owned()),
    }
}

fn port(container: &Container, port: &IntOrString) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            ports
                .find(|port| port.name.as_ref() == Some(name))
                .map(|port| port.container_port)
        }
    };
    let number = number.and_then(|number| u16::try_from(number).ok());
    number.ok_or_else(|| format!("there is no port {port:?}"))
}
