//! Session affinity (`sessionAffinity: ClientIP`): which endpoint does a client keep?
//!
//! Rendezvous hashing: a client uses the endpoint with the highest score, so it moves only when its
//! own endpoint goes away, and it gets the same endpoint after a restart and on every node. The hash
//! is XXH3, whose output is fixed since xxHash 0.8.0.

use std::net::IpAddr;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::model::{Affinity, Endpoint, EndpointTarget, Workload};

/// The hashed address of a client with session affinity.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClientHash(u64);

impl ClientHash {
    /// `None` without affinity. Hashes the client's primary address whatever family it uses, so that
    /// both families lead to one endpoint.
    pub(super) fn new(affinity: Affinity, source: &Workload) -> Option<Self> {
        match affinity {
            Affinity::None => None,
            Affinity::ClientIp => source.ips.first().map(|ip| Self(hash_ip(*ip, 0))),
        }
    }

    /// The score of an endpoint for this client.
    pub(super) fn score(self, endpoint: &Endpoint) -> u64 {
        match &endpoint.target {
            EndpointTarget::Workload(w) => xxh3_64_with_seed(w.uid.as_str().as_bytes(), self.0),
            EndpointTarget::Address { ip, .. } => hash_ip(*ip, self.0),
        }
    }
}

fn hash_ip(ip: IpAddr, seed: u64) -> u64 {
    match ip {
        IpAddr::V4(v4) => xxh3_64_with_seed(&v4.octets(), seed),
        IpAddr::V6(v6) => xxh3_64_with_seed(&v6.octets(), seed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A test vector of the xxHash specification. Another hash would move clients to other endpoints.
    #[test]
    fn hash_matches_the_specification() {
        assert_eq!(xxh3_64_with_seed(b"", 0), 0x2d06_8005_38d3_94c2);
    }
}
