//! How one CONNECT request is served: its head, the decision of the [`TunnelService`], and the relay.

use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::Poll;

use h2::RecvStream;
use h2::server::SendResponse;
use http::Request;
use tokio::time::sleep;

use crate::connect::{ConnectRequest, HeaderError};
use crate::engine::failure::TunnelStatus;
use crate::engine::head;
use crate::engine::recv_buffer::RecvBuffer;
use crate::engine::relay::{self, RESET_GRACE, RelayContext};
use crate::reason::Reason;
use crate::relay::{Chunk, Counters, RelayOpts, RelayOutcome, RelaySummary, Side};
use crate::server::{Accepted, Peer, Rejected, TunnelService};

/// Serves one request.
#[expect(
    clippy::manual_async_fn,
    reason = "an async fn would store its arguments twice"
)]
pub(super) fn serve_request<S: TunnelService>(
    service: Rc<S>,
    peer: Rc<Peer>,
    status: TunnelStatus,
    max_header_bytes: u32,
    request: Request<RecvStream>,
    mut respond: SendResponse<Chunk>,
) -> impl Future<Output = ()> {
    async move {
        let (head, body) = request.into_parts();
        let request = match head::decode_request(&head, max_header_bytes) {
            Ok(request) => request,
            Err(error) => {
                let detail = error.to_string();
                service.on_bad_request(&peer, Reason::ConnectMalformed, &detail);
                return reject(&mut respond, status_of(&error));
            }
        };
        let mut received = RecvBuffer::new(body);
        let decision = decide(&*service, &peer, request, &mut received, &mut respond).await;
        match decision {
            Some(Ok(accepted)) => run_relay(accepted, received, &mut respond, &status).await,
            Some(Err(Rejected { status, .. })) => reject(&mut respond, status),
            None => {}
        }
    }
}

/// The HTTP status of a malformed request.
fn status_of(error: &HeaderError) -> u16 {
    if error.header == "headers" { 431 } else { 400 }
}

fn reject(respond: &mut SendResponse<Chunk>, status: u16) {
    // Fails if the peer has reset the stream, and then it needs no response.
    let _reset = respond.send_response(head::rejection(status), true);
}

/// The service's decision; none if the peer resets the stream before.
///
/// Bytes that arrive meanwhile are buffered, within the stream's window. If the peer resets the stream after it sent
/// bytes, they still reach the application if the decision is made within [`RESET_GRACE`], as without a tunnel.
async fn decide<S: TunnelService>(
    service: &S,
    peer: &Peer,
    request: ConnectRequest,
    received: &mut RecvBuffer,
    respond: &mut SendResponse<Chunk>,
) -> Option<Result<Accepted, Rejected>> {
    let reset = poll_fn(|cx| {
        let has_failed = matches!(received.poll_fill(cx), Poll::Ready(Err(_)));
        let is_reset = respond.poll_reset(cx).is_ready();
        if has_failed || is_reset {
            Poll::Ready(received.is_empty())
        } else {
            Poll::Pending
        }
    });
    let cancelled = async {
        let has_nothing_to_deliver = reset.await;
        if !has_nothing_to_deliver {
            sleep(RESET_GRACE).await;
        }
    };
    tokio::select! {
        biased;
        () = cancelled => None,
        decision = service.connect(peer, request) => Some(decision),
    }
}

async fn run_relay(
    accepted: Accepted,
    mut received: RecvBuffer,
    respond: &mut SendResponse<Chunk>,
    status: &TunnelStatus,
) {
    let Accepted {
        upstream,
        response,
        opts,
        on_end,
    } = accepted;
    let RelayOpts {
        counters,
        stop,
        prefix,
        ..
    } = opts;
    let mut end = EndReport {
        on_end: Some(on_end),
        counters: &counters,
    };
    let context = RelayContext {
        app_side: Side::Upstream,
        counters: &counters,
        stop: &stop,
        status,
        load: None,
    };
    received.prepend(prefix);
    let outcome = match respond.send_response(head::encode_response(&response), false) {
        Ok(send) => {
            let received = std::future::ready(Ok(received));
            relay::run(&context, upstream, Vec::new(), send, received).await
        }
        Err(e) => relay::deliver_received(&context, upstream, received, e).await,
    };
    end.report(outcome);
}

/// Calls [`Accepted::on_end`] exactly once, also if the relay is dropped.
struct EndReport<'a> {
    on_end: Option<Box<dyn FnOnce(RelaySummary)>>,
    counters: &'a Counters,
}

impl EndReport<'_> {
    fn report(&mut self, outcome: RelayOutcome) {
        if let Some(on_end) = self.on_end.take() {
            on_end(RelaySummary::new(self.counters, outcome));
        }
    }
}

impl Drop for EndReport<'_> {
    fn drop(&mut self) {
        self.report(RelayOutcome::Failed(Reason::Stopped.into()));
    }
}
