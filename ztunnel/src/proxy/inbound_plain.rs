//! Plain connections to the pod: the same steps as through the mesh, without a verified identity.

use std::net::SocketAddr;
use std::rc::Rc;

use hbone::relay_tcp;
use tokio::net::TcpStream;

use super::Error;
use super::connections::Direction;
use super::context::PodContext;
use super::local_dst::{addressed_service, require_local_dst};
use super::redirected::register;
use super::sockets::{canonical, reset};
use super::tracker::ConnectionTracker;

/// Serves one plain inbound connection.
pub(crate) async fn serve(pod: Rc<PodContext>, downstream: TcpStream, peer: SocketAddr) {
    let peer = canonical(peer);
    let Some((mut tracker, original_dst)) = register(&pod, Direction::Inbound, &downstream, peer)
    else {
        return reset(downstream);
    };
    let stop = tracker.stop_signal();
    let connected = tokio::select! {
        biased;
        reason = stop.stopped() => Err(tracker.stop_error(reason)),
        // Boxed to keep this future small: most of a connection's time is in the relay.
        connected = Box::pin(connect(&pod, &mut tracker, peer, original_dst)) => connected,
    };
    match connected {
        Ok(upstream) => {
            tracker.mark_opened();
            let opts = tracker.relay_opts();
            let end = relay_tcp(downstream, upstream, opts).await;
            tracker.finish(&end);
        }
        Err(error) => {
            // Recorded before the reset, so that the reason is in log and metric when a client sees
            // the reset.
            tracker.finish_failed(&error);
            reset(downstream);
        }
    }
}

async fn connect(
    pod: &PodContext,
    tracker: &mut ConnectionTracker,
    peer: SocketAddr,
    original_dst: SocketAddr,
) -> Result<TcpStream, Error> {
    {
        let model = pod.store().load();
        let workload = model
            .workload(&pod.uid)
            .ok_or_else(|| Error::WorkloadUnknown(pod.uid.clone()))?;
        tracker.set_source(model.workload_by_ip(peer.ip()).cloned(), None);
        tracker.set_target(
            Some(workload.clone()),
            addressed_service(&model, workload, None, original_dst.port()),
        );
        require_local_dst(workload, original_dst)?;
    }
    tracker.authorize(original_dst)?;
    pod.sockets.dial_from(peer.ip(), original_dst).await
}
