//! Addresses of a redirected connection, and the ones that lead back into the mesh itself.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use mesh::{Endpoint, EndpointKey, Model, Service, Workload};
use socket2::SockRef;
use tokio::net::TcpStream;

use super::Error;

/// The data plane's own ports inside a pod: outbound, inbound plain, inbound HBONE.
const OWN_PORTS: [u16; 3] = [15001, 15006, 15008];

/// Whether a port is one of the data plane's own.
pub(super) fn is_own(port: u16) -> bool {
    OWN_PORTS.contains(&port)
}

/// Where the client wanted to go before the pod's rules redirected it here.
pub(super) fn original_destination(stream: &TcpStream) -> Result<SocketAddr, Error> {
    let socket = SockRef::from(stream);
    // Which of the two answers depends on the packets' family. A dual-stack listener's sockets are
    // IPv6 even for IPv4 packets.
    let address = socket
        .original_dst_v4()
        .or_else(|_| socket.original_dst_v6())
        .map_err(Error::OriginalDestination)?;
    let address = address
        .as_socket()
        .ok_or_else(|| Error::OriginalDestination(io::ErrorKind::Unsupported.into()))?;
    Ok(canonical(address))
}

/// An address without the form in which IPv6 sockets show IPv4 peers, and without flow and scope.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Refuses what is not addressed to this pod, or to a port of the data plane itself.
pub(super) fn refuse_elsewhere(pod: &Workload, destination: SocketAddr) -> Result<(), Error> {
    if is_own(destination.port()) {
        return Err(Error::SelfCall(destination));
    }
    if pod.ips.contains(&destination.ip()) {
        Ok(())
    } else {
        Err(Error::NotThisPod {
            authority: destination.to_string(),
        })
    }
}

/// The port of this pod behind a service's host name and port.
pub(super) fn port_behind(model: &Model, pod: &Workload, name: &str, port: u16) -> Option<u16> {
    let services = pod
        .services
        .iter()
        .filter_map(|service| model.service(&service.namespace, &service.name));
    let mut of_name = services.filter(|service| service.hostname.eq_ignore_ascii_case(name));
    endpoint_of(of_name.next()?, pod)?.target_port(port)
}

/// The pod as an endpoint of a service, whose endpoints are sorted.
pub(super) fn endpoint_of<'a>(service: &'a Service, pod: &Workload) -> Option<&'a Endpoint> {
    let key = EndpointKey::Workload(pod.uid.clone());
    let at = service
        .endpoints
        .binary_search_by(|endpoint| endpoint.key().cmp(&key))
        .ok()?;
    service.endpoints.get(at).map(AsRef::as_ref)
}

/// Ends a connection as the kernel ends one that nobody takes: with a reset, so that the
/// application sees a failure and not the end of a stream.
pub(super) fn reset(stream: TcpStream) {
    // Without the option the application sees an end of stream, which is the most that can be done
    // then.
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    drop(stream);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_peer_of_an_ipv6_socket_is_an_ipv4_peer() {
        let mapped: SocketAddr = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(canonical(mapped).to_string(), "10.0.0.1:80");
        let v6: SocketAddr = "[fd00::1]:80".parse().unwrap();
        assert_eq!(canonical(v6), v6);
    }
}
