//! Certificates from SPIRE, by the Delegated Identity API of this node's agent.
//!
//! The agent trusts this daemon to say which workloads run here. So the daemon subscribes for
//! exactly the identities it is asked for, by the selectors `k8s:ns` and `k8s:sa`, and takes from
//! an answer only the SVID that names exactly that identity: whatever else SPIRE would give stays
//! with SPIRE. Rotations are pushed by the agent; see [`CertificateSource::rotated`].
//!
//! Of the bundles only that of the own trust domain is trusted. Roots are one flat list to whoever
//! verifies a peer, so a federated trust domain's root among them could sign for this one.

mod agent;
mod answer;
mod bundles;
mod subscription;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use spiffe::{SpiffeId, TrustDomain};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
