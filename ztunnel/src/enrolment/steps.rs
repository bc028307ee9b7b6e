//! The steps of one pod's enrolment. Each ends in bounded time, except the wait of [`leave`] for
//! the pod's connections. A failed step leaves no partial state that would make the next attempt
//! fail.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh::WorkloadUid;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::plan::DesiredPod;
use super::pod_netns::{NetnsLease, NetnsLeases, NetnsSource};
use crate::capture::{self, Capture, Drift, Redirection, Rules};
use crate::dataplane::{self, DataPlane, Draining, Pod, Removal};
use crate::identity::Identities;
use crate::netns::{JobFailed, Netns, NetnsId, NetnsThreads};
use crate::ports_and_marks::{HBONE_PORT, INBOUND_PLAIN_PORT, OUTBOUND_PORT};
use crate::telemetry::Telemetry;

/// What every step needs. Clones share their state.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) threads: NetnsThreads,
    pub(super) source: Arc<dyn NetnsSource>,
    pub(super) data_plane: Arc<DataPlane>,
    pub(super) identities: Identities,
    pub(super) leases: NetnsLeases,
    pub(super) telemetry: Arc<Telemetry>,
    /// The node's own namespace.
    pub(super) node_netns: NetnsId,
    pub(super) verify_interval: Duration,
}

/// An enrolled pod: its connections are redirected, and the data plane serves them.
#[derive(Debug)]
pub(super) struct Enrolled {
    pub(super) netns: Arc<Netns>,
    lease: NetnsLease,
    capture: Capture,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum StepError {
    #[error("it has no address yet")]
    NoAddress,
    #[error("its network namespace is not known yet")]
    NetnsUnknown,
    #[error("the path of its network namespace could not be looked up")]
    NetnsSource(#[source] io::Error),
    #[error("its network namespace {path} could not be used")]
    NetnsUnusable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("its network namespace {0} is the node's own")]
    NetnsIsNodes(PathBuf),
    #[error(
        "the network namespace {path} has none of its addresses {expected:?}; is it another pod's?"
    )]
    NotItsAddresses {
        path: PathBuf,
        expected: Vec<IpAddr>,
    },
    #[error("its network namespace {netns} is already used by {owner}")]
    NetnsTaken { netns: NetnsId, owner: WorkloadUid },
    #[error(
        "the daemon cannot listen in its network namespace: does the application use port \
         {OUTBOUND_PORT}, {INBOUND_PLAIN_PORT} or {HBONE_PORT}?"
    )]
    Listeners(#[source] io::Error),
    #[error(transparent)]
    DataPlane(#[from] dataplane::Error),
    #[error(transparent)]
    Capture(#[from] capture::Error),
    #[error("its capture was changed or removed right after it was applied: {}", .0.code())]
    Unstable(Drift),
    #[error(transparent)]
    Threads(#[from] JobFailed),
}

impl StepError {
    /// Whether this is normal for a new pod.
    pub(super) fn is_expected(&self) -> bool {
        matches!(self, Self::NoAddress | Self::NetnsUnknown)
    }

    /// Whether it shows that the namespace is not the pod's, or no longer exists. Other errors mean
    /// that the check itself failed.
    fn is_definitive(&self) -> bool {
        match self {
            Self::NetnsIsNodes(_) | Self::NotItsAddresses { .. } => true,
            Self::NetnsUnusable { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ),
            _ => false,
        }
    }

    /// Stable reason code.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::NoAddress => "no_address",
            Self::NetnsUnknown => "netns_unknown",
            Self::NetnsSource(_) => "netns_source",
            Self::NetnsUnusable { .. } => "netns_unusable",
            Self::NetnsIsNodes(_) => "netns_is_nodes",
            Self::NotItsAddresses { .. } => "netns_without_pod_ip",
            Self::NetnsTaken { .. } => "netns_taken",
            Self::Listeners(_) => "listen_failed",
            Self::DataPlane(_) => "data_plane",
            Self::Capture(error) => error.code(),
            Self::Unstable(drift) => drift.code(),
            Self::Threads(_) => "netns_threads",
        }
    }
}

/// The result of a verification. Reasons are stable codes.
#[derive(Debug)]
pub(super) enum Verification {
    /// Capture and listeners are as applied.
    Intact,
    /// The capture differed and was repaired.
    Repaired(&'static str),
    /// The pod was removed from the data plane and must be enrolled again: its namespace, its
    /// addresses or its listeners have changed.
    MustReenrol(&'static str),
}

/// Opens the pod's namespace and verifies that it is the pod's: it has one of the pod's addresses
/// and is not the node's.
fn locate(
    source: &dyn NetnsSource,
    desired: &Arc<DesiredPod>,
    node_netns: NetnsId,
) -> Result<Netns, StepError> {
    if desired.ips.is_empty() {
        return Err(StepError::NoAddress);
    }
    let path = source
        .path(&desired.kube_uid)
        .map_err(StepError::NetnsSource)?
        .ok_or(StepError::NetnsUnknown)?;
    let unusable = |source| StepError::NetnsUnusable {
        path: path.clone(),
        source,
    };
    let netns = Netns::open(&path).map_err(unusable)?;
    if netns.id() == node_netns {
        return Err(StepError::NetnsIsNodes(path));
    }
    let addresses = netns.addresses().map_err(unusable)?;
    let mut ips = desired.ips.iter().map(IpAddr::to_canonical);
    if !ips.any(|ip| addresses.contains(&ip)) {
        return Err(StepError::NotItsAddresses {
            path,
            expected: desired.ips.clone(),
        });
    }
    Ok(netns)
}

/// Enrols a pod. The listeners accept before the first connection is redirected, so that none is
/// refused. Rules of an earlier process stay in force until one transaction replaces them, so that
/// none is sent in plaintext. Capture does not wait for the pod's certificate, which is requested
/// in parallel ([`FirstCertificates`][super::certificates::FirstCertificates]). A connection that
/// needs it waits for it.
pub(super) async fn enrol(
    context: &Context,
    uid: &WorkloadUid,
    desired: &Arc<DesiredPod>,
) -> Result<Enrolled, StepError> {
    let (source, pod, node_netns) = (context.source.clone(), desired.clone(), context.node_netns);
    let locate = move || locate(&*source, &pod, node_netns);
    let netns = Arc::new(context.threads.run(locate).await??);
    let taken = |owner| StepError::NetnsTaken {
        netns: netns.id(),
        owner,
    };
    let lease = context.leases.acquire(netns.id(), uid).map_err(taken)?;
    let (inside, workers) = (netns.clone(), context.data_plane.workers());
    let listeners = context
        .threads
        .run(move || capture::listeners(&inside, workers))
        .await?
        .map_err(StepError::Listeners)?;
    context
        .data_plane
        .add(Pod {
            workload: uid.clone(),
            netns: netns.clone(),
            listeners,
        })
        .await?;
    match redirect(context, &netns, &desired.redirection).await {
        Ok(capture) => {
            context.telemetry.record_pod_started();
            Ok(Enrolled {
                netns,
                lease,
                capture,
            })
        }
        Err(error) => {
            // Report the first failure. Readiness shows whether the data plane responds.
            let _ = context.data_plane.remove(uid, Removal::Gone).await;
            Err(error)
        }
    }
}

/// Applies the redirect rules and verifies them at once.
async fn redirect(
    context: &Context,
    netns: &Arc<Netns>,
    redirection: &Redirection,
) -> Result<Capture, StepError> {
    let (netns, rules) = (netns.clone(), Rules::Redirect(redirection.clone()));
    let apply = move || -> Result<Capture, StepError> {
        let mut capture = Capture::apply(netns, rules)?;
        match capture.verify(true)? {
            None => Ok(capture),
            Some(drift) => Err(StepError::Unstable(drift)),
        }
    };
    context.threads.run(apply).await?
}

/// Verifies the pod's namespace, capture and listeners, and repairs the capture in place. Removes a
/// pod that cannot be repaired from the data plane.
pub(super) async fn verify(
    context: &Context,
    uid: &WorkloadUid,
    desired: &Arc<DesiredPod>,
    enrolled: &mut Option<Enrolled>,
) -> Result<Verification, StepError> {
    let Some(current) = enrolled.take() else {
        return Ok(Verification::MustReenrol("never_enrolled"));
    };
    let (source, pod, node_netns) = (context.source.clone(), desired.clone(), context.node_netns);
    let check = move || verify_here(&*source, &pod, node_netns, current);
    let (current, verification) = context.threads.run(check).await?;
    if matches!(verification, Ok(Verification::MustReenrol(_))) {
        release(context, uid, current).await?;
    } else {
        *enrolled = Some(current);
    }
    verification
}

/// The blocking part of [`verify`].
fn verify_here(
    source: &dyn NetnsSource,
    desired: &Arc<DesiredPod>,
    node_netns: NetnsId,
    mut current: Enrolled,
) -> (Enrolled, Result<Verification, StepError>) {
    let verification = match locate(source, desired, node_netns) {
        Ok(netns) if netns.id() != current.netns.id() => {
            Ok(Verification::MustReenrol("netns_replaced"))
        }
        // Without a path, keep the namespace that is open: the source may be late, or the pod about
        // to be deleted.
        Ok(_) | Err(StepError::NoAddress | StepError::NetnsUnknown | StepError::NetnsSource(_)) => {
            verify_capture(&mut current, desired)
        }
        Err(error) if error.is_definitive() => Ok(Verification::MustReenrol(error.code())),
        // The check itself failed, for instance without free descriptors. This must not cost the
        // pod its connections.
        Err(error) => match verify_capture(&mut current, desired) {
            Ok(Verification::Intact) => Err(error),
            verification => verification,
        },
    };
    (current, verification)
}

/// Verifies the capture, and applies it again if it or the desired rules have changed.
fn verify_capture(
    enrolled: &mut Enrolled,
    desired: &DesiredPod,
) -> Result<Verification, StepError> {
    let rules = Rules::Redirect(desired.redirection.clone());
    let reason = match enrolled.capture.verify(true)? {
        Some(drift @ Drift::ListenersGone) => return Ok(Verification::MustReenrol(drift.code())),
        Some(drift) => drift.code(),
        None if *enrolled.capture.rules() == rules => return Ok(Verification::Intact),
        None => "pod_changed",
    };
    enrolled.capture = Capture::apply(enrolled.netns.clone(), rules)?;
    Ok(Verification::Repaired(reason))
}

/// How [`leave`] ended.
pub(super) enum LeaveOutcome {
    /// The last connection has ended, and the rules are removed.
    Clean,
    /// The wait for the last connection was cancelled.
    Interrupted,
}

/// Removes a running pod from the mesh. New connections are no longer redirected; established ones
/// keep the rules that they need until the last of them has ended.
pub(super) async fn leave(
    context: &Context,
    uid: &WorkloadUid,
    enrolled: &mut Option<Enrolled>,
    interrupt: CancellationToken,
) -> Result<LeaveOutcome, StepError> {
    let Some(netns) = enrolled.as_ref().map(|enrolled| enrolled.netns.clone()) else {
        return Ok(LeaveOutcome::Clean);
    };
    let inside = netns.clone();
    let capture = context
        .threads
        .run(move || Capture::apply(inside, Rules::ReturnPath))
        .await??;
    let draining = context.data_plane.remove(uid, Removal::OptOut).await?;
    tokio::select! {
        drained = wait_for_drain(context, draining, &netns, capture) => drained?,
        () = interrupt.cancelled() => {
            // The data plane has removed it already. It is enrolled again as a new pod.
            context.telemetry.record_pod_stopped();
            *enrolled = None;
            return Ok(LeaveOutcome::Interrupted);
        }
    }
    context
        .threads
        .run(move || Capture::remove(&netns))
        .await??;
    context.telemetry.record_pod_stopped();
    *enrolled = None;
    Ok(LeaveOutcome::Clean)
}

/// Keeps the return path in place until the pod's last connection has ended.
async fn wait_for_drain(
    context: &Context,
    draining: Draining,
    netns: &Arc<Netns>,
    mut capture: Capture,
) -> Result<(), StepError> {
    let mut tick = interval(context.verify_interval);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let finished = draining.finished();
    tokio::pin!(finished);
    loop {
        tokio::select! {
            () = &mut finished => return Ok(()),
            _ = tick.tick() => {}
        }
        let inside = netns.clone();
        let check = move || -> Result<_, capture::Error> {
            match capture.verify(false)? {
                Some(drift) => Ok((Capture::apply(inside, Rules::ReturnPath)?, Some(drift))),
                None => Ok((capture, None)),
            }
        };
        let drift;
        (capture, drift) = context.threads.run(check).await??;
        if let Some(drift) = drift {
            context.telemetry.record_capture_repair(drift.code());
        }
    }
}

/// Resets the connections of a deleted pod and removes it from the data plane. Its rules remain:
/// processes that still run in its namespace must not send plaintext. The rules are gone with the
/// namespace.
pub(super) async fn forget(
    context: &Context,
    uid: &WorkloadUid,
    enrolled: Option<Enrolled>,
) -> Result<(), StepError> {
    match enrolled {
        Some(enrolled) => release(context, uid, enrolled).await,
        // It may have opted out and still have connections.
        None => {
            drop(context.data_plane.remove(uid, Removal::Gone).await?);
            Ok(())
        }
    }
}

/// How long resetting the connections of a deleted pod may take.
const RESET_TIMEOUT: Duration = Duration::from_secs(5);

/// Resets the pod's connections, and releases the lease of its namespace when its last socket is
/// closed or [`RESET_TIMEOUT`] has passed, so that a stuck connection does not keep the next pod
/// out.
async fn release(
    context: &Context,
    uid: &WorkloadUid,
    enrolled: Enrolled,
) -> Result<(), StepError> {
    let removed = context.data_plane.remove(uid, Removal::Gone).await;
    context.telemetry.record_pod_stopped();
    let _ = timeout(RESET_TIMEOUT, removed?.finished()).await;
    drop(enrolled.lease);
    Ok(())
}

/// Removes the rules of an earlier process from the namespace of a pod that is not in the mesh. The
/// connections that needed them ended with that process.
pub(super) async fn sweep(context: &Context, kube_uid: Arc<str>) -> Result<(), StepError> {
    let source = context.source.clone();
    let node_netns = context.node_netns;
    let sweep = move || -> Result<(), StepError> {
        // An unknown or unusable namespace has nothing to remove.
        let Ok(Some(path)) = source.path(&kube_uid) else {
            return Ok(());
        };
        let Ok(netns) = Netns::open(&path) else {
            return Ok(());
        };
        if netns.id() != node_netns && Capture::is_present(&netns)? {
            Capture::remove(&netns)?;
        }
        Ok(())
    };
    context.threads.run(sweep).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_namespace_is_definitive_and_failed_check_is_not() {
        let unusable = |source: io::Error| StepError::NetnsUnusable {
            path: "/run/netns/a".into(),
            source,
        };
        assert!(StepError::NetnsIsNodes("/proc/1/ns/net".into()).is_definitive());
        let not_its_own = StepError::NotItsAddresses {
            path: "/run/netns/a".into(),
            expected: vec![],
        };
        assert!(not_its_own.is_definitive());
        let open = |path: &str| Netns::open(path.as_ref()).map(drop).unwrap_err();
        assert!(unusable(open("/run/netns/no-such-namespace")).is_definitive());
        assert!(
            unusable(open("/dev/null")).is_definitive(),
            "an ordinary file, as after an unmount"
        );
        assert!(unusable(open("/dev/null/a")).is_definitive());
        use nix::libc::{EINTR, EIO, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM};
        for errno in [EMFILE, ENFILE, ENOMEM, ENOBUFS, EINTR, EIO, EPERM] {
            let error = unusable(io::Error::from_raw_os_error(errno));
            assert!(!error.is_definitive(), "{error:?}");
        }
    }
}
