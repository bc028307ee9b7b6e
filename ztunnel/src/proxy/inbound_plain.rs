//! What reaches the pod in clear: the same way as through the mesh, but nobody has proved anything.

use std::net::SocketAddr;
use std::rc::Rc;

use hbone::relay_tcp;
use tokio::net::TcpStream;

use super::address::{canonical, refuse_elsewhere, reset};
use super::captured::register;
use super::flow::Flow;
use super::{Error, inbound};
use crate::dataplane::PodContext;
use crate::dataplane::registry::Direction;

/// Carries one connection that came in clear.
pub(crate) async fn serve(pod: Rc<PodContext>, downstream: TcpStream, peer: SocketAddr) {
    let peer = canonical(peer);
    let Some((mut flow, wanted)) = register(&pod, Direction::Inbound, &downstream, peer) else {
        return reset(downstream);
    };
    let stop = flow.stop();
    let connected = tokio::select! {
        biased;
        reason = stop.stopped() => Err(flow.stopped(reason)),
        // Boxed, because a connection spends its life in the relay and not here.
        connected = Box::pin(connect(&pod, &mut flow, peer, wanted)) => connected,
    };
    match connected {
        Ok(upstream) => {
            flow.opened();
            let opts = flow.relay_opts();
            let end = relay_tcp(downstream, upstream, opts).await;
            flow.closed(&end);
        }
        Err(error) => {
            // Told before the reset, so that whoever sees the reset finds its reason.
            flow.failed(&error);
            reset(downstream);
        }
    }
}

async fn connect(
    pod: &PodContext,
    flow: &mut Flow,
    peer: SocketAddr,
    wanted: SocketAddr,
) -> Result<TcpStream, Error> {
    {
        let model = pod.store.load();
        let workload = model
            .workload(&pod.uid)
            .ok_or_else(|| Error::WorkloadUnknown(pod.uid.clone()))?;
        flow.from(model.workload_by_ip(peer.ip()).cloned(), None);
        flow.to(
            Some(workload.clone()),
            inbound::service_behind(&model, workload, None, wanted.port()),
        );
        refuse_elsewhere(workload, wanted)?;
    }
    flow.authorize(wanted)?;
    pod.sockets.dial_from(peer.ip(), wanted).await
}
