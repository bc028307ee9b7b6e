//! One identity's subscription: a stream of answers, begun again when it breaks or when somebody
//! asks and the last answer has been used up.

use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use spiffe::SpiffeId;
use spire_api::pb::spire::api::agent::delegatedidentity::v1::SubscribeToX509sviDsResponse;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use super::agent::{Agent, Failure, ServiceAccount};
use super::answer::{Svid, wanted};
use super::{UpdateCounts, backoff};

/// How long the agent may take for the first answer. It has what it needs in memory, unless the
/// entry is new and its server has to sign.
const ANSWER: Duration = Duration::from_secs(5);

/// Which identities SPIRE has something new for.
#[derive(Debug, Default)]
pub(super) struct Turns(watch::Sender<UpdateCounts>);

impl Turns {
    pub(super) fn subscribe(&self) -> watch::Receiver<UpdateCounts> {
        self.0.subscribe()
    }

    pub(super) fn forget(&self, identity: &SpiffeId) {
        self.0
            .send_if_modified(|turns| turns.remove(identity).is_some());
    }

    fn turn(&self, identity: &SpiffeId) {
        self.0
            .send_modify(|turns| *turns.entry(identity.clone()).or_default() += 1);
    }
}

/// A handle to what is known for one identity. Clones share it.
#[derive(Clone)]
pub(super) struct Subscription(Arc<Shared>);

struct Shared {
    /// How many times somebody asked.
    asked: watch::Sender<u64>,
    answer: watch::Sender<Answer>,
    end: CancellationToken,
}

/// The last answer.
#[derive(Default)]
struct Answer {
    /// The questions it was given after.
    asked: u64,
    /// The SVID until somebody takes it: its key is kept in one place.
    outcome: Option<Result<Svid, Failure>>,
}

/// A subscription, and the work of keeping it.
pub(super) fn begin(
    agent: Agent,
    identity: SpiffeId,
    workload: ServiceAccount,
    turns: Arc<Turns>,
) -> (Subscription, impl Future<Output = ()> + Send) {
    let (asked, receiver) = watch::channel(0);
    let shared = Arc::new(Shared {
        asked,
        answer: watch::Sender::default(),
        end: CancellationToken::new(),
    });
    let follower = Follower {
        shared: shared.clone(),
        asked: receiver,
        agent,
        identity,
        workload,
        turns,
        leaf: None,
        failure: None,
    };
    let end = shared.end.clone();
    let following = async move {
        end.run_until_cancelled_owned(follower.follow()).await;
    };
    (Subscription(shared), following)
}

impl Subscription {
    /// The SVID: the one that was pushed, if nobody took it yet, or else what the agent says when
    /// it is asked now.
    pub(super) async fn svid(&self) -> Result<Svid, Failure> {
        if let Some(Ok(svid)) = self.take(0) {
            return Ok(svid);
        }
        let mut answers = self.0.answer.subscribe();
        loop {
            let mut asked = 0;
            self.0.asked.send_modify(|count| {
                *count += 1;
                asked = *count;
            });
            let answered = answers.wait_for(|answer| answer.asked >= asked);
            tokio::select! {
                // The sender is ours too, so there is always an answer to wait for.
                _ = answered => {}
                () = self.0.end.cancelled() => {
                    let message = "the identity is no longer wanted on this node";
                    return Err(Failure::new("spire_not_asked", message));
                }
            }
            // Another who asked at the same time may have taken it.
            if let Some(outcome) = self.take(asked) {
                return outcome;
            }
        }
    }

    /// Ends it, and wipes the key if there is one.
    pub(super) fn end(&self) {
        self.0.end.cancel();
        self.0.answer.send_modify(|answer| answer.outcome = None);
    }

    /// An answer to question `asked` or a later one. Failures may be read any number of times.
    fn take(&self, asked: u64) -> Option<Result<Svid, Failure>> {
        let mut taken = None;
        self.0.answer.send_if_modified(|answer| {
            if answer.asked >= asked {
                taken = match &answer.outcome {
                    Some(Err(failure)) => Some(Err(failure.clone())),
                    _ => answer.outcome.take(),
                };
            }
            false
        });
        taken
    }
}

/// The side that talks to the agent.
struct Follower {
    shared: Arc<Shared>,
    asked: watch::Receiver<u64>,
    agent: Agent,
    identity: SpiffeId,
    workload: ServiceAccount,
    turns: Arc<Turns>,
    /// Of the last SVID, so that one that comes again is not taken for a rotation.
    leaf: Option<CertificateDer<'static>>,
    /// Why the last answer was none.
    failure: Option<Failure>,
}

/// Why a stream is not read any further.
enum End {
    Asked,
    Failed(Failure),
}

type Answers = Streaming<SubscribeToX509sviDsResponse>;

impl Follower {
    async fn follow(mut self) {
        let mut failures = 0;
        loop {
            match self.stream(&mut failures).await {
                End::Asked => {}
                End::Failed(failure) => {
                    self.publish(Err(failure));
                    failures += 1;
                    tokio::select! {
                        () = sleep(backoff(failures)) => {}
                        () = asked(&mut self.asked) => {}
                    }
                }
            }
        }
    }

    /// Subscribes, and passes on what comes.
    async fn stream(&mut self, failures: &mut u32) -> End {
        let (agent, workload) = (self.agent.clone(), self.workload.clone());
        let mut opening = Box::pin(open(&agent, &workload));
        let opened = match timeout(ANSWER, &mut opening).await {
            Ok(opened) => opened,
            Err(_) => {
                // Said to whoever waits; the answer is still welcome until somebody asks anew.
                self.publish(Err(agent.silent(ANSWER)));
                tokio::select! {
                    opened = &mut opening => opened,
                    () = asked(&mut self.asked) => return End::Asked,
                }
            }
        };
        let (mut answers, mut answer) = match opened {
            Ok(opened) => opened,
            Err(failure) => return End::Failed(failure),
        };
        *failures = 0;
        loop {
            self.publish(wanted(answer, &self.identity));
            let message = tokio::select! {
                message = answers.message() => message,
                () = asked(&mut self.asked) => return End::Asked,
            };
            answer = match agent.next(message) {
                Ok(answer) => answer,
                Err(failure) => return End::Failed(failure),
            };
        }
    }

    /// Makes an answer known. One that nobody asked for, and that is news, is a rotation.
    fn publish(&mut self, outcome: Result<Svid, Failure>) {
        let leaf = outcome.as_ref().ok().and_then(|svid| svid.chain.first());
        let failure = outcome.as_ref().err();
        let news =
            failure != self.failure.as_ref() || (failure.is_none() && leaf != self.leaf.as_ref());
        if let Some(leaf) = leaf {
            self.leaf = Some(leaf.clone());
        }
        self.failure = failure.cloned();
        let asked = *self.asked.borrow_and_update();
        let mut unasked = false;
        self.shared.answer.send_if_modified(|answer| {
            unasked = answer.asked == asked;
            // What was ended holds no key.
            let known = unasked && !news;
            if known || self.shared.end.is_cancelled() {
                return false;
            }
            *answer = Answer {
                asked,
                outcome: Some(outcome),
            };
            true
        });
        if unasked && news {
            self.turns.turn(&self.identity);
        }
    }
}

async fn open(
    agent: &Agent,
    workload: &ServiceAccount,
) -> Result<(Answers, SubscribeToX509sviDsResponse), Failure> {
    let mut answers = agent.svids(workload).await?;
    let first = agent.next(answers.message().await)?;
    Ok((answers, first))
}

/// Until somebody asks.
async fn asked(questions: &mut watch::Receiver<u64>) {
    if questions.changed().await.is_err() {
        // Nobody is left who could; the sender is held beside the receiver.
        std::future::pending::<()>().await;
    }
}
