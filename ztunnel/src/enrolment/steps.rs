//! The steps of one pod's enrolment: each ends in bounded time, and a step that failed leaves
//! nothing half done that the next attempt would trip over.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mesh::WorkloadUid;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::claims::{Claim, Claims};
use super::plan::Desired;
use super::source::NetnsSource;
use crate::capture::{self, Capture, Drift, Redirection, Rules};
use crate::dataplane::{self, DataPlane, Draining, Pod, Removal};
use crate::identity::Identities;
use crate::netns::{JobFailed, Netns, NetnsId, NetnsThreads};
use crate::telemetry::Telemetry;

/// What every step needs. Clones share it.
#[derive(Clone)]
pub(super) struct Tools {
    pub(super) threads: NetnsThreads,
    pub(super) source: Arc<dyn NetnsSource>,
    pub(super) data_plane: Arc<DataPlane>,
    pub(super) identities: Identities,
    pub(super) claims: Claims,
    pub(super) telemetry: Arc<Telemetry>,
    /// The node's own namespace, which is no pod's.
    pub(super) node: NetnsId,
    pub(super) verify_interval: Duration,
}

/// A pod that is captured and served.
#[derive(Debug)]
pub(super) struct Enrolled {
    pub(super) netns: Arc<Netns>,
    claim: Claim,
    capture: Capture,
}

/// Why a pod is not in the mesh.
#[derive(Debug, thiserror::Error)]
pub(super) enum StepError {
    #[error("it has no address yet")]
    NoAddress,
    #[error("its network namespace is not known yet")]
    NetnsUnknown,
    #[error("its network namespace could not be looked up")]
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
        "the network namespace {path} has none of its addresses {wanted:?}; is it another pod's?"
    )]
    NotItsAddresses { path: PathBuf, wanted: Vec<IpAddr> },
    #[error("its network namespace {netns} belongs to {owner}")]
    NetnsTaken { netns: NetnsId, owner: WorkloadUid },
    #[error(
        "the daemon cannot listen in it: does the application use ports 15001, 15006 or 15008?"
    )]
    Listeners(#[source] io::Error),
    #[error(transparent)]
    DataPlane(#[from] dataplane::Error),
    #[error(transparent)]
    Capture(#[from] capture::Error),
    #[error("its capture does not stand right after it was put in place: {}", .0.code())]
    Unstable(Drift),
    #[error(transparent)]
    Threads(#[from] JobFailed),
}

impl StepError {
    /// Whether every new pod goes through this.
    pub(super) fn is_expected(&self) -> bool {
        matches!(self, Self::NoAddress | Self::NetnsUnknown)
    }

    /// Whether it says that the namespace is not the pod's, or is there no more, and not only that
    /// nobody could look.
    fn is_finding(&self) -> bool {
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

/// What a verification found.
#[derive(Debug)]
pub(super) enum Found {
    /// Everything stands.
    Stands,
    /// Something did not, and does again.
    Repaired(&'static str),
    /// The pod must be enrolled anew: its namespace, its addresses or its listeners are not what
    /// they were.
    Replaced(&'static str),
}

/// Finds the pod's namespace and proves that it is the pod's: it has one of the pod's addresses,
/// and it is not the node's.
fn locate(
    source: &dyn NetnsSource,
    desired: &Arc<Desired>,
    node: NetnsId,
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
    if netns.id() == node {
        return Err(StepError::NetnsIsNodes(path));
    }
    let has = netns.addresses().map_err(unusable)?;
    if !desired
        .ips
        .iter()
        .any(|ip| has.contains(&ip.to_canonical()))
    {
        return Err(StepError::NotItsAddresses {
            path,
            wanted: desired.ips.clone(),
        });
    }
    Ok(netns)
}

/// Brings a pod in. The listeners accept before the first connection is redirected, so that none is
/// refused; whatever rules an earlier process left stay in force until they are replaced in one
/// transaction, so that none escapes. Capture waits for nobody: the pod's certificate is fetched
/// beside it ([`FirstCertificates`][super::certificates::FirstCertificates]), and a connection that
/// needs one waits for it itself.
pub(super) async fn enrol(
    tools: &Tools,
    uid: &WorkloadUid,
    desired: &Arc<Desired>,
) -> Result<Enrolled, StepError> {
    let (source, wanted, node) = (tools.source.clone(), desired.clone(), tools.node);
    let netns = Arc::new(
        tools
            .threads
            .run(move || locate(&*source, &wanted, node))
            .await??,
    );
    let taken = |owner| StepError::NetnsTaken {
        netns: netns.id(),
        owner,
    };
    let claim = tools.claims.claim(netns.id(), uid).map_err(taken)?;
    let (inside, workers) = (netns.clone(), tools.data_plane.workers());
    let listeners = tools
        .threads
        .run(move || capture::listeners(&inside, workers))
        .await?
        .map_err(StepError::Listeners)?;
    tools
        .data_plane
        .add(Pod {
            workload: uid.clone(),
            netns: netns.clone(),
            listeners,
        })
        .await?;
    match redirect(tools, &netns, &desired.redirection).await {
        Ok(capture) => {
            tools.telemetry.record_pod_started();
            Ok(Enrolled {
                netns,
                claim,
                capture,
            })
        }
        Err(error) => {
            // The failure that matters is the first; a data plane that does not answer either shows
            // in readiness.
            let _ = tools.data_plane.remove(uid, Removal::Gone).await;
            Err(error)
        }
    }
}

async fn redirect(
    tools: &Tools,
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
    tools.threads.run(apply).await?
}

/// Looks whether everything stands, inside the pod's namespace, and repairs what can be repaired in
/// place. A pod that was replaced no longer has anything in the data plane.
pub(super) async fn verify(
    tools: &Tools,
    uid: &WorkloadUid,
    desired: &Arc<Desired>,
    enrolled: &mut Option<Enrolled>,
) -> Result<Found, StepError> {
    let Some(was) = enrolled.take() else {
        return Ok(Found::Replaced("never_enrolled"));
    };
    let (source, wanted, node) = (tools.source.clone(), desired.clone(), tools.node);
    let look = move || inspect(&*source, &wanted, node, was);
    let (was, found) = tools.threads.run(look).await?;
    if matches!(found, Ok(Found::Replaced(_))) {
        release(tools, uid, was).await?;
    } else {
        *enrolled = Some(was);
    }
    found
}

fn inspect(
    source: &dyn NetnsSource,
    desired: &Arc<Desired>,
    node: NetnsId,
    mut was: Enrolled,
) -> (Enrolled, Result<Found, StepError>) {
    let found = match locate(source, desired, node) {
        Ok(netns) if netns.id() != was.netns.id() => Ok(Found::Replaced("netns_replaced")),
        // The namespace that is held open lives on; the source may be behind, or the pod about to
        // go.
        Ok(_) | Err(StepError::NoAddress | StepError::NetnsUnknown | StepError::NetnsSource(_)) => {
            stands(&mut was, desired)
        }
        Err(error) if error.is_finding() => Ok(Found::Replaced(error.code())),
        // To be unable to look, out of descriptors for instance, is no finding, and must not cost
        // the pod its connections.
        Err(error) => match stands(&mut was, desired) {
            Ok(Found::Stands) => Err(error),
            found => found,
        },
    };
    (was, found)
}

fn stands(was: &mut Enrolled, desired: &Desired) -> Result<Found, StepError> {
    let rules = Rules::Redirect(desired.redirection.clone());
    let why = match was.capture.verify(true)? {
        Some(Drift::ListenersGone) => return Ok(Found::Replaced(Drift::ListenersGone.code())),
        Some(drift) => drift.code(),
        None if *was.capture.rules() == rules => return Ok(Found::Stands),
        None => "pod_changed",
    };
    was.capture = Capture::apply(was.netns.clone(), rules)?;
    Ok(Found::Repaired(why))
}

/// How a pod's leave ended.
pub(super) enum Left {
    /// Its last connection has ended and nothing of ours is left in it.
    Clean,
    /// It was told to stop waiting.
    Interrupted,
}

/// Lets a pod go that lives on without the mesh. New connections are its own at once; what is
/// established keeps its rules until the last of it has ended.
pub(super) async fn leave(
    tools: &Tools,
    uid: &WorkloadUid,
    enrolled: &mut Option<Enrolled>,
    interrupt: CancellationToken,
) -> Result<Left, StepError> {
    let Some(netns) = enrolled.as_ref().map(|enrolled| enrolled.netns.clone()) else {
        return Ok(Left::Clean);
    };
    let inside = netns.clone();
    let capture = tools
        .threads
        .run(move || Capture::apply(inside, Rules::ReturnPath))
        .await??;
    let leaving = tools.data_plane.remove(uid, Removal::OptOut).await?;
    tokio::select! {
        ended = stay(tools, leaving, &netns, capture) => ended?,
        () = interrupt.cancelled() => {
            // It has left the data plane all the same, and comes back as another.
            tools.telemetry.record_pod_stopped();
            *enrolled = None;
            return Ok(Left::Interrupted);
        }
    }
    tools.threads.run(move || Capture::remove(&netns)).await??;
    tools.telemetry.record_pod_stopped();
    *enrolled = None;
    Ok(Left::Clean)
}

/// Keeps the return path in place until the pod's last connection has ended.
async fn stay(
    tools: &Tools,
    leaving: Draining,
    netns: &Arc<Netns>,
    mut capture: Capture,
) -> Result<(), StepError> {
    let mut tick = interval(tools.verify_interval);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let ended = leaving.finished();
    tokio::pin!(ended);
    loop {
        tokio::select! {
            () = &mut ended => return Ok(()),
            _ = tick.tick() => {}
        }
        let inside = netns.clone();
        let look = move || -> Result<_, capture::Error> {
            match capture.verify(false)? {
                Some(drift) => Ok((Capture::apply(inside, Rules::ReturnPath)?, Some(drift))),
                None => Ok((capture, None)),
            }
        };
        let drift;
        (capture, drift) = tools.threads.run(look).await??;
        if let Some(drift) = drift {
            tools.telemetry.record_capture_repair(drift.code());
        }
    }
}

/// Ends the pod's connections and forgets it. Its rules stay: whatever still runs in the namespace of
/// a pod that is gone must not speak in clear, and the rules go when the namespace does.
pub(super) async fn forget(
    tools: &Tools,
    uid: &WorkloadUid,
    enrolled: Option<Enrolled>,
) -> Result<(), StepError> {
    match enrolled {
        Some(enrolled) => release(tools, uid, enrolled).await,
        // It may have left with connections that were still open.
        None => {
            drop(tools.data_plane.remove(uid, Removal::Gone).await?);
            Ok(())
        }
    }
}

/// How long the connections of a pod that is gone may take to be reset.
const RESET: Duration = Duration::from_secs(5);

/// Resets the pod's connections, and gives up the claim on its namespace when the last of its sockets
/// is closed. A connection that outlives the deadline is the data plane's fault, and must not keep the
/// next pod out.
async fn release(tools: &Tools, uid: &WorkloadUid, enrolled: Enrolled) -> Result<(), StepError> {
    let ended = tools.data_plane.remove(uid, Removal::Gone).await;
    tools.telemetry.record_pod_stopped();
    let _ = timeout(RESET, ended?.finished()).await;
    drop(enrolled.claim);
    Ok(())
}

/// Removes what an earlier process left in the namespace of a pod that is not in the mesh.
/// Connections that needed it died with that process.
pub(super) async fn sweep(tools: &Tools, kube_uid: Arc<str>) -> Result<(), StepError> {
    let source = tools.source.clone();
    let node = tools.node;
    let look = move || -> Result<(), StepError> {
        // A pod whose namespace is not known, or not usable, has nothing that could be removed.
        let Ok(Some(path)) = source.path(&kube_uid) else {
            return Ok(());
        };
        let Ok(netns) = Netns::open(&path) else {
            return Ok(());
        };
        if netns.id() != node && Capture::is_present(&netns)? {
            Capture::remove(&netns)?;
        }
        Ok(())
    };
    tools.threads.run(look).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_is_gone_is_a_finding_and_one_that_could_not_be_looked_at_is_none() {
        let unusable = |source: io::Error| StepError::NetnsUnusable {
            path: "/run/netns/a".into(),
            source,
        };
        assert!(StepError::NetnsIsNodes("/proc/1/ns/net".into()).is_finding());
        let not_its_own = StepError::NotItsAddresses {
            path: "/run/netns/a".into(),
            wanted: vec![],
        };
        assert!(not_its_own.is_finding());
        let open = |path: &str| Netns::open(path.as_ref()).map(drop).unwrap_err();
        assert!(unusable(open("/run/netns/no-such-namespace")).is_finding());
        assert!(
            unusable(open("/dev/null")).is_finding(),
            "its mount is gone, and an ordinary file left"
        );
        assert!(unusable(open("/dev/null/a")).is_finding());
        use nix::libc::{EINTR, EIO, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM};
        for errno in [EMFILE, ENFILE, ENOMEM, ENOBUFS, EINTR, EIO, EPERM] {
            let error = unusable(io::Error::from_raw_os_error(errno));
            assert!(!error.is_finding(), "{error:?}");
        }
    }
}
