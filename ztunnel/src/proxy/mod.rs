//! What happens to one connection: where it goes, whether it may, and how its end is told.
//!
//! - [`outbound`]: what the pod opens, redirected to 15001;
//! - [`inbound`]: what reaches the pod through the mesh, on 15008;
//! - [`inbound_plain`]: what reaches the pod in clear, redirected to 15006.
//!
//! Each takes the same steps: **register** the connection, so that whoever ends connections finds
//! it; decide (this is where authorization stands, between the registration and the first dial);
//! **serve** it; and account for it once, however it ends ([`flow`]).

mod address;
mod error;
mod flow;
pub(crate) mod inbound;
pub(crate) mod inbound_plain;
pub(crate) mod outbound;

pub(crate) use error::Error;

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use tokio::net::{TcpListener, TcpStream};

    use crate::dataplane::PodContext;

    async fn accepted() -> (TcpStream, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (stream, peer) = listener.accept().await.unwrap();
        drop(client);
        (stream, peer)
    }

    /// A node carries 100,000 connections, and each is one of these futures for as long as it
    /// lives: a kilobyte more is 100 MB. Measured on x86-64; a little room is left on top.
    #[tokio::test]
    async fn a_connections_future_stays_small() {
        let pod = Rc::new(PodContext::for_tests());
        let (stream, peer) = accepted().await;
        let outbound = size_of_val(&super::outbound::serve(pod.clone(), stream, peer));
        let (stream, peer) = accepted().await;
        let inbound_plain = size_of_val(&super::inbound_plain::serve(pod.clone(), stream, peer));
        {
            let (a, _) = accepted().await;
            let (b, _) = accepted().await;
            eprintln!(
                "relay_tcp {}",
                size_of_val(&hbone::relay_tcp(a, b, hbone::RelayOpts::default()))
            );
            fn sz<A, B, F: Future>(_: impl Fn(A, B, hbone::RelayOpts) -> F) -> usize {
                size_of::<F>()
            }
            eprintln!("stream.relay {}", sz(hbone::Stream::relay));
            eprintln!("stream {}", size_of::<hbone::Stream>());
        }
        let (stream, peer) = accepted().await;
        let inbound = size_of_val(&super::inbound::serve(pod, stream, peer));
        eprintln!(
            "{outbound} {inbound_plain} {inbound} {}",
            size_of::<super::flow::Flow>()
        );
        assert!(outbound <= 2048, "outbound: {outbound} bytes");
        assert!(
            inbound_plain <= 2048,
            "inbound, plain: {inbound_plain} bytes"
        );
        assert!(inbound <= 4096, "a tunnel: {inbound} bytes");
    }
}
