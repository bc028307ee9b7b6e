//! The kubelet's probes, sent from the node's own address.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe, TCPSocketAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::time::sleep;

use super::kubelet::Pod;
use crate::http;
use crate::netns;

/// Period of a probe until its first success, instead of `periodSeconds`: a pod is ready as soon as
/// its program is.
const INITIAL_PERIOD: Duration = Duration::from_millis(25);

/// Probes a container. Calls `set_ready` whenever its readiness changes. Returns when it must be
/// killed, with the reason.
pub(super) async fn run(
    pod: &Pod,
    container: &Container,
    set_ready: &dyn Fn(bool, String),
) -> String {
    if let Some(probe) = &container.startup_probe {
        let timeout = Timing::of(probe).startup_timeout();
        if tokio::time::timeout(timeout, first_success(pod, container, probe))
            .await
            .is_err()
        {
            return format!(
                "startup probe of {} did not succeed within {timeout:?}",
                container.name
            );
        }
        if container.readiness_probe.is_none() {
            set_ready(true, String::new());
        }
    }
    tokio::select! {
        never = watch_readiness(pod, container, set_ready) => match never {},
        reason = liveness_failure(pod, container) => reason,
    }
}

async fn watch_readiness(
    pod: &Pod,
    container: &Container,
    set_ready: &dyn Fn(bool, String),
) -> std::convert::Infallible {
    let Some(probe) = &container.readiness_probe else {
        return std::future::pending().await;
    };
    let timing = Timing::of(probe);
    sleep(timing.initial_delay).await;
    let (mut was_ready, mut failures, mut successes) = (None, 0, 0);
    loop {
        match check(pod, container, probe, timing.timeout).await {
            Ok(()) => {
                (failures, successes) = (0, successes + 1);
                if was_ready != Some(true) && successes >= timing.success_threshold {
                    was_ready = Some(true);
                    set_ready(true, String::new());
                }
            }
            Err(reason) => {
                (failures, successes) = (failures + 1, 0);
                let is_lost = was_ready == Some(true) && failures >= timing.failure_threshold;
                if was_ready.is_none() || is_lost {
                    was_ready = Some(false);
                    let name = &container.name;
                    set_ready(false, format!("readiness probe of {name}: {reason}"));
                }
            }
        }
        // The declared period applies once the container has been ready.
        sleep(if was_ready == Some(true) || failures == 0 {
            timing.period
        } else {
            INITIAL_PERIOD
        })
        .await;
    }
}

/// Waits until the liveness probe fails. Returns the reason.
async fn liveness_failure(pod: &Pod, container: &Container) -> String {
    let Some(probe) = &container.liveness_probe else {
        return std::future::pending().await;
    };
    let timing = Timing::of(probe);
    sleep(timing.initial_delay).await;
    let mut failures = 0;
    loop {
        sleep(timing.period).await;
        failures = match check(pod, container, probe, timing.timeout).await {
            Ok(()) => 0,
            Err(reason) if failures + 1 >= timing.failure_threshold => {
                return format!("liveness probe of {}: {reason}", container.name);
            }
            Err(_) => failures + 1,
        };
    }
}

async fn first_success(pod: &Pod, container: &Container, probe: &Probe) {
    let timing = Timing::of(probe);
    sleep(timing.initial_delay).await;
    while check(pod, container, probe, timing.timeout).await.is_err() {
        sleep(INITIAL_PERIOD).await;
    }
}

/// The timing of a probe, with Kubernetes' defaults.
struct Timing {
    initial_delay: Duration,
    period: Duration,
    timeout: Duration,
    failure_threshold: u32,
    success_threshold: u32,
}

impl Timing {
    fn of(probe: &Probe) -> Self {
        let number = |value: Option<i32>, default: u32| {
            value.and_then(|v| v.try_into().ok()).unwrap_or(default)
        };
        let seconds = |value, default| Duration::from_secs(number(value, default).into());
        Self {
            initial_delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10),
            timeout: seconds(probe.timeout_seconds, 1),
            failure_threshold: number(probe.failure_threshold, 3).max(1),
            success_threshold: number(probe.success_threshold, 1).max(1),
        }
    }

    /// The time after which a startup probe without success has failed.
    fn startup_timeout(&self) -> Duration {
        self.initial_delay + self.period * self.failure_threshold
    }
}

/// Runs a probe once. The error is the reason of the failure.
async fn check(
    pod: &Pod,
    container: &Container,
    probe: &Probe,
    timeout: Duration,
) -> Result<(), String> {
    if let Some(action) = &probe.http_get {
        return http_get(pod, container, action, timeout).await;
    }
    if let Some(action) = &probe.tcp_socket {
        return tcp_connect(pod, container, action, timeout).await;
    }
    match probe.exec.as_ref().and_then(|exec| exec.command.as_ref()) {
        Some(command) => exec(pod, container, command, timeout).await,
        None => Err("only httpGet, tcpSocket and exec are supported".to_owned()),
    }
}

/// Succeeds on any status from 200 to 399. Redirects are not followed.
async fn http_get(
    pod: &Pod,
    container: &Container,
    action: &HTTPGetAction,
    timeout: Duration,
) -> Result<(), String> {
    let to = SocketAddr::new(
        address(pod, action.host.as_deref())?,
        port(container, &action.port)?,
    );
    let path = action.path.clone().unwrap_or_else(|| "/".to_owned());
    let headers: Vec<_> = action
        .http_headers
        .iter()
        .flatten()
        .map(|header| (header.name.clone(), header.value.clone()))
        .collect();
    let get = move || http::get(to, &path, &headers, timeout);
    let response = netns::run_in_async(&pod.node_netns, get)
        .await
        .map_err(|error| format!("{error:#}"))?;
    match response
        .map_err(|error| format!("http://{to}: {error:#}"))?
        .status
    {
        200..=399 => Ok(()),
        status => Err(format!("http://{to}: status {status}")),
    }
}

async fn tcp_connect(
    pod: &Pod,
    container: &Container,
    action: &TCPSocketAction,
    timeout: Duration,
) -> Result<(), String> {
    let to = SocketAddr::new(
        address(pod, action.host.as_deref())?,
        port(container, &action.port)?,
    );
    let connect = move || TcpStream::connect_timeout(&to, timeout);
    let connected = netns::run_in_async(&pod.node_netns, connect)
        .await
        .map_err(|error| format!("{error:#}"))?;
    connected
        .map(drop)
        .map_err(|error| format!("{to}: {error}"))
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
        Err(_) => Err(format!("exec: still running after {timeout:?}")),
    }
}

fn address(pod: &Pod, host: Option<&str>) -> Result<IpAddr, String> {
    match host {
        Some(host) => host
            .parse()
            .map_err(|_| format!("host {host}: only addresses are supported")),
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
