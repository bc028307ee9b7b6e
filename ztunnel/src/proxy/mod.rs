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
mod captured;
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
    /// lives: a kilobyte more is 100 MB. Two thirds are the relay's. Measured on x86-64: 3200, 1880
    /// and 3136 bytes.
    #[tokio::test]
    async fn a_connections_future_stays_small() {
        let pod = Rc::new(PodContext::for_tests());
        let (stream, peer) = accepted().await;
        let outbound = size_of_val(&super::outbound::serve(pod.clone(), stream, peer));
        let (stream, peer) = accepted().await;
        let plain = size_of_val(&super::inbound_plain::serve(pod.clone(), stream, peer));
        let (stream, peer) = accepted().await;
        let tunnel = size_of_val(&super::inbound::serve(pod, stream, peer));
        assert!(outbound <= 3328, "outbound: {outbound} bytes");
        assert!(plain <= 2048, "inbound in clear: {plain} bytes");
        assert!(tunnel <= 3328, "a tunnel: {tunnel} bytes");
    }
}
