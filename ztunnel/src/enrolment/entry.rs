//! What the reconciler knows of one pod, between its steps.

use std::error::Error;
use std::sync::Arc;
use std::time::SystemTime;

use component::ErrorChain;
use mesh::WorkloadUid;
use spiffe::SpiffeId;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Duration, Instant, sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::certificates::{FirstCertificate, FirstCertificates, Outcome};
use super::plan::{Actual, Desired, Phase};
use super::status::{PodState, PodStatus};
use super::steps::{self, Enrolled, Found, Left, StepError, Tools};
use super::{RETRY_FIRST, RETRY_MAX};
use crate::capture::NetnsWatch;

/// Changes in a namespace within this time are one reason to verify: a transaction is told of in
/// several messages.
const TOGETHER: Duration = Duration::from_millis(50);

/// How long nothing more is heard of one namespace after a change: whoever may change rules in a pod
/// without end must not thereby keep the daemon busy. One look with a listing costs 5 ms.
const QUIET: Duration = Duration::from_millis(250);

/// A step that is to be done.
pub(super) enum Step {
    Enrol(Arc<Desired>),
    Verify(Arc<Desired>),
    Leave,
    Sweep(Arc<str>),
    Forget,
}

/// A step that was done, with what it leaves.
pub(super) enum Finished {
    Enrolled(Result<Enrolled, StepError>, Arc<Desired>),
    Verified(Result<Found, StepError>, Option<Enrolled>, Arc<Desired>),
    Left(Result<Left, StepError>, Option<Enrolled>),
    Swept(Result<(), StepError>),
    Forgotten,
}

/// How changes in namespaces are heard of: the tasks that listen, and where they tell.
pub(super) struct Ears {
    pub(super) watches: JoinSet<()>,
    pub(super) heard: mpsc::Sender<WorkloadUid>,
}

/// One pod.
pub(super) struct Entry {
    phase: Phase,
    interrupt: Option<CancellationToken>,
    enrolled: Option<Enrolled>,
    enrolled_as: Option<Arc<Desired>>,
    certificate: Option<FirstCertificate>,
    watch: Option<DropGuard>,
    heard: bool,
    verify_at: Option<Instant>,
    retry_at: Option<Instant>,
    failures: u32,
    failed_as: Option<Arc<Desired>>,
    tried: bool,
    failure: Option<(&'static str, String)>,
    netns: Option<String>,
    repairs: u64,
    since: SystemTime,
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            phase: Phase::Pending,
            interrupt: None,
            enrolled: None,
            enrolled_as: None,
            certificate: None,
            watch: None,
            heard: false,
            verify_at: None,
            retry_at: None,
            failures: 0,
            failed_as: None,
            tried: false,
            failure: None,
            netns: None,
            repairs: 0,
            since: SystemTime::now(),
        }
    }
}

impl Entry {
    /// The entry as the plan sees it.
    pub(super) fn actual(&self, now: Instant) -> Actual {
        Actual {
            phase: self.phase,
            busy: self.interrupt.is_some(),
            waiting: self.retry_at.is_some_and(|at| at > now),
            failed_as: self.failed_as.clone(),
            due: self.heard || self.verify_at.is_some_and(|at| at <= now),
            enrolled_as: self.enrolled_as.clone(),
        }
    }

    /// Changes whenever what is published of the pod does.
    pub(super) fn mark(&self) -> (Phase, Option<&'static str>, SystemTime, u64, bool) {
        let reason = self.why().map(|(code, _)| code);
        (self.phase, reason, self.since, self.repairs, self.tried())
    }

    /// What keeps the pod out of the mesh: a step that failed, or else a certificate that has not
    /// come.
    fn why(&self) -> Option<(&'static str, String)> {
        let certificate = self.certificate.as_ref();
        let uncertified = certificate.and_then(|first| first.outcome().err());
        let uncertified = uncertified.map(|error| (error.code(), error.to_string()));
        self.failure.clone().or(uncertified)
    }

    /// When there is something to do even if nothing happens.
    pub(super) fn wakes(&self) -> Option<Instant> {
        if self.interrupt.is_some() {
            return None;
        }
        self.retry_at.or(self.verify_at)
    }

    /// Something changed in the pod's namespace.
    pub(super) fn hear(&mut self) {
        self.heard = true;
    }

    /// Ends a wait that has become pointless.
    pub(super) fn interrupt(&self) {
        if let Some(interrupt) = &self.interrupt {
            interrupt.cancel();
        }
    }

    /// Whether the pod was enrolled, or failed to be, at least once; and so with its certificate.
    pub(super) fn tried(&self) -> bool {
        self.tried && self.certificate.as_ref().is_none_or(FirstCertificate::told)
    }

    /// The pod has to prove this identity: a first certificate is waited for, if none is yet.
    pub(super) fn needs(
        &mut self,
        uid: &WorkloadUid,
        identity: &SpiffeId,
        certificates: &mut FirstCertificates,
    ) {
        let waited_for = self.certificate.as_ref().map(FirstCertificate::identity);
        if waited_for != Some(identity) {
            self.certificate = Some(certificates.wait(uid, identity));
        }
    }

    /// Takes in what came of the wait for the first certificate; unless another identity is waited
    /// for by now.
    pub(super) fn certified(&mut self, uid: &WorkloadUid, identity: &SpiffeId, outcome: Outcome) {
        let waiting = self.certificate.as_mut();
        let Some(first) = waiting.filter(|first| first.identity() == identity) else {
            return;
        };
        if !first.tell(outcome) {
            return;
        }
        if self.phase == Phase::Enrolled {
            self.since = SystemTime::now();
        }
        match outcome {
            Ok(()) => tracing::info!(pod = %uid, "the pod can prove who it is"),
            Err(error) => {
                let (reason, consequence) = (error.code(), "its connections through the mesh fail");
                tracing::warn!(pod = %uid, reason, %error, consequence, "the pod has no certificate");
            }
        }
    }

    /// What is published of the pod; nothing if it has nothing to do with the mesh.
    pub(super) fn status(&self) -> Option<PodStatus> {
        let why = self.why();
        let state = match self.phase {
            Phase::Pending => PodState::Pending,
            Phase::Enrolled if why.is_some() => PodState::Pending,
            Phase::Enrolled => PodState::Enrolled,
            Phase::Leaving => PodState::Leaving,
            Phase::Clean => return None,
        };
        let (reason, message) = why.unzip();
        Some(PodStatus {
            state,
            reason,
            message,
            since: self.since,
            netns: self.netns.clone(),
            repairs: self.repairs,
        })
    }

    /// Marks a step as begun and returns it, to be run by the caller.
    pub(super) fn begin(
        &mut self,
        tools: &Tools,
        uid: &WorkloadUid,
        step: Step,
    ) -> impl Future<Output = Finished> + Send + 'static {
        let interrupt = CancellationToken::new();
        self.interrupt = Some(interrupt.clone());
        self.heard = false;
        match &step {
            Step::Enrol(_) => self.enter(Phase::Pending),
            Step::Leave => self.enter(Phase::Leaving),
            Step::Verify(_) | Step::Sweep(_) | Step::Forget => {}
        }
        if matches!(step, Step::Enrol(_) | Step::Leave | Step::Forget) {
            self.watch = None;
        }
        if !matches!(step, Step::Enrol(_) | Step::Verify(_)) {
            self.certificate = None;
        }
        let enrolled = if matches!(step, Step::Enrol(_) | Step::Sweep(_)) {
            None
        } else {
            self.enrolled.take()
        };
        run(tools.clone(), uid.clone(), step, enrolled, interrupt)
    }

    /// Takes in what a step left.
    pub(super) fn end(
        &mut self,
        tools: &Tools,
        uid: &WorkloadUid,
        finished: Finished,
        ears: &mut Ears,
    ) {
        self.interrupt = None;
        self.tried = true;
        match finished {
            Finished::Enrolled(Ok(enrolled), desired) => {
                let path = enrolled.netns.path().display().to_string();
                tracing::info!(pod = %uid, netns = path, "pod enrolled");
                self.netns = Some(path);
                self.watch = listen(&enrolled, uid, ears);
                self.enrolled = Some(enrolled);
                self.enter(Phase::Enrolled);
                self.succeed(tools, Some(desired));
            }
            Finished::Enrolled(Err(error), desired) => self.fail(uid, &error, Some(desired)),
            Finished::Verified(outcome, enrolled, desired) => {
                self.enrolled = enrolled;
                self.verified(tools, uid, outcome, desired);
            }
            Finished::Left(Ok(left), enrolled) => {
                self.enrolled = enrolled;
                self.left(uid, &left);
                self.succeed(tools, None);
            }
            Finished::Left(Err(error), enrolled) => {
                self.enrolled = enrolled;
                self.fail(uid, &error, None);
            }
            Finished::Swept(Ok(())) => {
                self.enter(Phase::Clean);
                self.succeed(tools, None);
            }
            Finished::Swept(Err(error)) => self.fail(uid, &error, None),
            Finished::Forgotten => {}
        }
    }

    fn verified(
        &mut self,
        tools: &Tools,
        uid: &WorkloadUid,
        outcome: Result<Found, StepError>,
        desired: Arc<Desired>,
    ) {
        match outcome {
            Ok(Found::Stands) => self.succeed(tools, Some(desired)),
            Ok(Found::Repaired(reason)) => {
                tracing::warn!(pod = %uid, reason, "capture did not stand: repaired");
                tools.telemetry.record_capture_repair(reason);
                self.repairs += 1;
                self.succeed(tools, Some(desired));
            }
            Ok(Found::Replaced(reason)) => {
                tracing::warn!(pod = %uid, reason, "pod must be enrolled anew");
                tools.telemetry.record_capture_repair(reason);
                self.repairs += 1;
                self.watch = None;
                self.enter(Phase::Pending);
                self.succeed(tools, None);
            }
            Err(error) => {
                if self.enrolled.is_none() {
                    self.enter(Phase::Pending);
                }
                self.fail(uid, &error, Some(desired));
            }
        }
    }

    fn left(&mut self, uid: &WorkloadUid, left: &Left) {
        match left {
            Left::Clean => {
                tracing::info!(pod = %uid, "pod has left the mesh");
                self.enter(Phase::Clean);
            }
            Left::Interrupted => self.enter(Phase::Pending),
        }
    }

    fn enter(&mut self, phase: Phase) {
        if self.phase != phase {
            self.phase = phase;
            self.since = SystemTime::now();
        }
    }

    fn succeed(&mut self, tools: &Tools, desired: Option<Arc<Desired>>) {
        if self.failure.take().is_some() {
            self.since = SystemTime::now();
        }
        self.failures = 0;
        self.retry_at = None;
        self.verify_at = desired
            .is_some()
            .then(|| Instant::now() + tools.verify_interval);
        self.enrolled_as = desired;
    }

    /// The same failure again is not news.
    fn fail(&mut self, uid: &WorkloadUid, error: &StepError, failed_as: Option<Arc<Desired>>) {
        let message = ErrorChain(error as &dyn Error).to_string();
        let failure = (error.code(), message);
        if self.failure.as_ref() != Some(&failure) {
            let (reason, message) = (failure.0, &failure.1);
            if error.is_expected() {
                tracing::info!(pod = %uid, reason, message, "pod is not set up yet");
            } else {
                tracing::warn!(pod = %uid, reason, message, "a step of the pod's enrolment failed");
            }
            self.since = SystemTime::now();
        }
        self.failure = Some(failure);
        self.failed_as = failed_as;
        let wait = RETRY_FIRST
            .saturating_mul(1 << self.failures.min(16))
            .min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(Instant::now() + wait);
    }
}

async fn run(
    tools: Tools,
    uid: WorkloadUid,
    step: Step,
    mut enrolled: Option<Enrolled>,
    interrupt: CancellationToken,
) -> Finished {
    match step {
        Step::Enrol(desired) => {
            Finished::Enrolled(steps::enrol(&tools, &uid, &desired).await, desired)
        }
        Step::Verify(desired) => {
            let outcome = steps::verify(&tools, &uid, &desired, &mut enrolled).await;
            Finished::Verified(outcome, enrolled, desired)
        }
        Step::Leave => {
            let outcome = steps::leave(&tools, &uid, &mut enrolled, interrupt).await;
            Finished::Left(outcome, enrolled)
        }
        Step::Sweep(kube_uid) => Finished::Swept(steps::sweep(&tools, kube_uid).await),
        Step::Forget => {
            if let Err(error) = steps::forget(&tools, &uid, enrolled).await {
                let error = &error as &dyn Error;
                tracing::error!(pod = %uid, error, "the data plane may hold a pod that is gone");
            }
            Finished::Forgotten
        }
    }
}

/// Tells the reconciler of every change in the pod's namespace until the answer is dropped. A pod
/// whose changes cannot be heard is verified all the same, only later.
fn listen(enrolled: &Enrolled, uid: &WorkloadUid, ears: &mut Ears) -> Option<DropGuard> {
    let watch = match NetnsWatch::new(&enrolled.netns) {
        Ok(watch) => watch,
        Err(error) => {
            let consequence = "changes in its namespace are found only by the next verification";
            tracing::warn!(pod = %uid, %error, consequence, "the pod's namespace is not heard");
            return None;
        }
    };
    let (uid, heard, stop) = (uid.clone(), ears.heard.clone(), CancellationToken::new());
    let stopped = stop.clone();
    let tell = async move {
        while watch.changed().await.is_ok() {
            sleep(TOGETHER).await;
            if heard.send(uid.clone()).await.is_err() {
                return;
            }
            sleep(QUIET).await;
        }
    };
    ears.watches.spawn(async move {
        tokio::select! {
            () = stopped.cancelled() => {}
            () = tell => {}
        }
    });
    Some(stop.drop_guard())
}
