//! The reconciler's record of one pod between its steps, and the status that is published of it.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::SystemTime;

use component::ErrorChain;
use mesh::WorkloadUid;
use spiffe::SpiffeId;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::certificates::{FirstCertificate, FirstCertificates, Outcome};
use super::changes::ChangeListener;
use super::plan::{ActualPod, DesiredPod, Phase};
use super::steps::{self, Context, Enrolled, LeaveOutcome, StepError, Verification};
use super::{RETRY_FIRST, RETRY_MAX};

/// The published state of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodState {
    /// The pod opted in and is not in the mesh, for the reason in its status.
    Pending,
    /// Its capture and its listeners were present at the last verification.
    Enrolled,
    /// The pod opted out and still has connections from before.
    Leaving,
}

impl PodState {
    /// Stable name, in the admin dump and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            PodState::Pending => "pending",
            PodState::Enrolled => "enrolled",
            PodState::Leaving => "leaving",
        }
    }
}

/// The published status of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    /// Its state.
    pub state: PodState,
    /// Why it is not enrolled, as a stable code.
    pub reason: Option<&'static str>,
    /// Why it is not enrolled, as text.
    pub message: Option<String>,
    /// When state or reason last changed.
    pub since: SystemTime,
    /// The path of its network namespace, once found.
    pub netns: Option<String>,
    /// How often its capture was repaired.
    pub repairs: u64,
}

/// The status of every pod of this node that is in the mesh, joining or leaving.
pub type Statuses = Arc<BTreeMap<WorkloadUid, PodStatus>>;

/// A step to run for a pod.
pub(super) enum Step {
    Enrol(Arc<DesiredPod>),
    Verify(Arc<DesiredPod>),
    Leave,
    Sweep(Arc<str>),
    Forget,
}

/// A finished step with its outcome.
pub(super) enum Finished {
    Enrolled(Result<Enrolled, StepError>, Arc<DesiredPod>),
    Verified(
        Result<Verification, StepError>,
        Option<Enrolled>,
        Arc<DesiredPod>,
    ),
    Left(Result<LeaveOutcome, StepError>, Option<Enrolled>),
    Swept(Result<(), StepError>),
    Forgotten,
}

/// The record of one pod.
pub(super) struct Entry {
    phase: Phase,
    /// Cancels the wait of the running step; `None` if no step is running.
    interrupt: Option<CancellationToken>,
    enrolled: Option<Enrolled>,
    enrolled_as: Option<Arc<DesiredPod>>,
    certificate: Option<FirstCertificate>,
    /// Stops the notifications of changes in the pod's namespace when dropped.
    watch: Option<DropGuard>,
    /// The namespace has changed since the last step began.
    is_dirty: bool,
    verify_at: Option<Instant>,
    retry_at: Option<Instant>,
    /// Consecutive failures, for the backoff.
    failures: u32,
    failed_as: Option<Arc<DesiredPod>>,
    /// A step has finished at least once.
    attempted: bool,
    /// Reason code and text of the last step's failure.
    step_failure: Option<(&'static str, String)>,
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
            is_dirty: false,
            verify_at: None,
            retry_at: None,
            failures: 0,
            failed_as: None,
            attempted: false,
            step_failure: None,
            netns: None,
            repairs: 0,
            since: SystemTime::now(),
        }
    }
}

impl Entry {
    /// The pod's actual state, as input of the plan.
    pub(super) fn actual(&self, now: Instant) -> ActualPod {
        ActualPod {
            phase: self.phase,
            busy: self.interrupt.is_some(),
            waiting: self.retry_at.is_some_and(|at| at > now),
            failed_as: self.failed_as.clone(),
            due: self.is_dirty || self.verify_at.is_some_and(|at| at <= now),
            enrolled_as: self.enrolled_as.clone(),
        }
    }

    /// A value that changes whenever the published status may change.
    pub(super) fn fingerprint(&self) -> (Phase, Option<&'static str>, SystemTime, u64, bool) {
        let reason = self.failure().map(|(code, _)| code);
        let attempted = self.is_attempted();
        (self.phase, reason, self.since, self.repairs, attempted)
    }

    /// Code and text of what keeps the pod out of the mesh: a failed step, or else a missing
    /// certificate.
    fn failure(&self) -> Option<(&'static str, String)> {
        let certificate = self.certificate.as_ref();
        let uncertified = certificate.and_then(|first| first.outcome().err());
        let uncertified = uncertified.map(|error| (error.code(), error.to_string()));
        self.step_failure.clone().or(uncertified)
    }

    /// When the next step is due without any event.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        if self.interrupt.is_some() {
            return None;
        }
        self.retry_at.or(self.verify_at)
    }

    /// Records that the pod's namespace has changed and must be verified.
    pub(super) fn mark_dirty(&mut self) {
        self.is_dirty = true;
    }

    /// Cancels the wait of the running step.
    pub(super) fn interrupt(&self) {
        if let Some(interrupt) = &self.interrupt {
            interrupt.cancel();
        }
    }

    /// Whether a step has finished at least once, and the wait for the certificate has had an
    /// outcome.
    pub(super) fn is_attempted(&self) -> bool {
        let certificate = self.certificate.as_ref();
        self.attempted && certificate.is_none_or(FirstCertificate::is_reported)
    }

    /// Starts to wait for a certificate of this identity, unless that wait is running.
    pub(super) fn await_certificate(
        &mut self,
        uid: &WorkloadUid,
        identity: &SpiffeId,
        certificates: &mut FirstCertificates,
    ) {
        let awaited = self.certificate.as_ref().map(FirstCertificate::identity);
        if awaited != Some(identity) {
            self.certificate = Some(certificates.wait(uid, identity));
        }
    }

    /// Records the outcome of the wait for a certificate. Ignores one of an identity that is no
    /// longer awaited.
    pub(super) fn record_certificate(
        &mut self,
        uid: &WorkloadUid,
        identity: &SpiffeId,
        outcome: Outcome,
    ) {
        let awaited = self.certificate.as_mut();
        let Some(first) = awaited.filter(|first| first.identity() == identity) else {
            return;
        };
        if !first.record(outcome) {
            return;
        }
        if self.phase == Phase::Enrolled {
            self.since = SystemTime::now();
        }
        match outcome {
            Ok(()) => tracing::info!(pod = %uid, "the pod's identity has a certificate"),
            Err(error) => {
                let (reason, consequence) = (error.code(), "its connections through the mesh fail");
                tracing::warn!(
                    pod = %uid, reason, %error, consequence,
                    "the pod's identity has no certificate"
                );
            }
        }
    }

    /// The pod's published status; `None` if it is not in the mesh, joining or leaving.
    pub(super) fn status(&self) -> Option<PodStatus> {
        let failure = self.failure();
        let state = match self.phase {
            Phase::Pending => PodState::Pending,
            Phase::Enrolled if failure.is_some() => PodState::Pending,
            Phase::Enrolled => PodState::Enrolled,
            Phase::Leaving => PodState::Leaving,
            Phase::Clean => return None,
        };
        let (reason, message) = failure.unzip();
        Some(PodStatus {
            state,
            reason,
            message,
            since: self.since,
            netns: self.netns.clone(),
            repairs: self.repairs,
        })
    }

    /// Records the begin of a step and returns its future, for the caller to run.
    pub(super) fn begin(
        &mut self,
        context: &Context,
        uid: &WorkloadUid,
        step: Step,
    ) -> impl Future<Output = Finished> + Send + 'static {
        let interrupt = CancellationToken::new();
        self.interrupt = Some(interrupt.clone());
        self.is_dirty = false;
        match &step {
            Step::Enrol(_) => self.set_phase(Phase::Pending),
            Step::Leave => self.set_phase(Phase::Leaving),
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
        run(context.clone(), uid.clone(), step, enrolled, interrupt)
    }

    /// Records the outcome of a step.
    pub(super) fn end(
        &mut self,
        context: &Context,
        uid: &WorkloadUid,
        finished: Finished,
        changes: &mut ChangeListener,
    ) {
        self.interrupt = None;
        self.attempted = true;
        match finished {
            Finished::Enrolled(Ok(enrolled), desired) => {
                let path = enrolled.netns.path().display().to_string();
                tracing::info!(pod = %uid, netns = path, "pod enrolled");
                self.netns = Some(path);
                self.watch = changes.listen(&enrolled.netns, uid);
                self.enrolled = Some(enrolled);
                self.set_phase(Phase::Enrolled);
                self.succeed(context, Some(desired));
            }
            Finished::Enrolled(Err(error), desired) => self.fail(uid, &error, Some(desired)),
            Finished::Verified(outcome, enrolled, desired) => {
                self.enrolled = enrolled;
                self.verified(context, uid, outcome, desired);
            }
            Finished::Left(Ok(outcome), enrolled) => {
                self.enrolled = enrolled;
                self.left(uid, &outcome);
                self.succeed(context, None);
            }
            Finished::Left(Err(error), enrolled) => {
                self.enrolled = enrolled;
                self.fail(uid, &error, None);
            }
            Finished::Swept(Ok(())) => {
                self.set_phase(Phase::Clean);
                self.succeed(context, None);
            }
            Finished::Swept(Err(error)) => self.fail(uid, &error, None),
            Finished::Forgotten => {}
        }
    }

    fn verified(
        &mut self,
        context: &Context,
        uid: &WorkloadUid,
        outcome: Result<Verification, StepError>,
        desired: Arc<DesiredPod>,
    ) {
        match outcome {
            Ok(Verification::Intact) => self.succeed(context, Some(desired)),
            Ok(Verification::Repaired(reason)) => {
                tracing::warn!(pod = %uid, reason, "capture was changed or removed: repaired");
                context.telemetry.record_capture_repair(reason);
                self.repairs += 1;
                self.succeed(context, Some(desired));
            }
            Ok(Verification::MustReenrol(reason)) => {
                tracing::warn!(pod = %uid, reason, "pod must be enrolled again");
                context.telemetry.record_capture_repair(reason);
                self.repairs += 1;
                self.watch = None;
                self.set_phase(Phase::Pending);
                self.succeed(context, None);
            }
            Err(error) => {
                if self.enrolled.is_none() {
                    self.set_phase(Phase::Pending);
                }
                self.fail(uid, &error, Some(desired));
            }
        }
    }

    fn left(&mut self, uid: &WorkloadUid, outcome: &LeaveOutcome) {
        match outcome {
            LeaveOutcome::Clean => {
                tracing::info!(pod = %uid, "pod has left the mesh");
                self.set_phase(Phase::Clean);
            }
            LeaveOutcome::Interrupted => self.set_phase(Phase::Pending),
        }
    }

    fn set_phase(&mut self, phase: Phase) {
        if self.phase != phase {
            self.phase = phase;
            self.since = SystemTime::now();
        }
    }

    fn succeed(&mut self, context: &Context, desired: Option<Arc<DesiredPod>>) {
        if self.step_failure.take().is_some() {
            self.since = SystemTime::now();
        }
        self.failures = 0;
        self.retry_at = None;
        self.verify_at = desired
            .is_some()
            .then(|| Instant::now() + context.verify_interval);
        self.enrolled_as = desired;
    }

    /// Records a failure and schedules the retry. Logs only a failure that differs from the
    /// previous one.
    fn fail(&mut self, uid: &WorkloadUid, error: &StepError, failed_as: Option<Arc<DesiredPod>>) {
        let message = ErrorChain(error as &dyn Error).to_string();
        let failure = (error.code(), message);
        if self.step_failure.as_ref() != Some(&failure) {
            let (reason, message) = (failure.0, &failure.1);
            if error.is_expected() {
                tracing::info!(pod = %uid, reason, message, "the pod is not set up yet");
            } else {
                tracing::warn!(pod = %uid, reason, message, "a step of the pod's enrolment failed");
            }
            self.since = SystemTime::now();
        }
        self.step_failure = Some(failure);
        self.failed_as = failed_as;
        let backoff = RETRY_FIRST
            .saturating_mul(1 << self.failures.min(16))
            .min(RETRY_MAX);
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Some(Instant::now() + backoff);
    }
}

/// Runs a step.
async fn run(
    context: Context,
    uid: WorkloadUid,
    step: Step,
    mut enrolled: Option<Enrolled>,
    interrupt: CancellationToken,
) -> Finished {
    match step {
        Step::Enrol(desired) => {
            Finished::Enrolled(steps::enrol(&context, &uid, &desired).await, desired)
        }
        Step::Verify(desired) => {
            let outcome = steps::verify(&context, &uid, &desired, &mut enrolled).await;
            Finished::Verified(outcome, enrolled, desired)
        }
        Step::Leave => {
            let outcome = steps::leave(&context, &uid, &mut enrolled, interrupt).await;
            Finished::Left(outcome, enrolled)
        }
        Step::Sweep(kube_uid) => Finished::Swept(steps::sweep(&context, kube_uid).await),
        Step::Forget => {
            if let Err(error) = steps::forget(&context, &uid, enrolled).await {
                let error = &error as &dyn Error;
                tracing::error!(pod = %uid, error, "cannot remove a deleted pod's connections");
            }
            Finished::Forgotten
        }
    }
}
