//! The scene of most routing tests: a meshed client, and the pods of a service `web`.

use std::collections::BTreeMap;

use anyhow::Result;
use lab::{Lab, Options, Where};

use crate::manifest::{self, Pod};
use crate::programs::{PORT, greeter, nginx};

/// A client in the mesh on node `a`, in namespace `in`; namespace `out` is not in the mesh.
///
/// # Errors
/// The lab does not come up.
pub fn lab_with(more: impl IntoIterator<Item = String>) -> Result<Lab> {
    let scene = [
        manifest::two_nodes(),
        manifest::namespace("in", Some("ambient")),
        manifest::namespace("out", None),
        Pod::new("in", "client").on("a").into(),
    ];
    Lab::up(
        manifest::all(scene.into_iter().chain(more)),
        Options::default(),
    )
}

/// The client.
pub fn client() -> Where {
    Where::pod("in/client")
}

/// A pod that answers requests with its own name; an endpoint of the service `web`.
pub fn web(namespace: &str, name: &str, node: &str) -> Pod {
    let pod = Pod::new(namespace, name).on(node).label("app", "web");
    pod.runs(nginx(&[PORT], name)).port(Some("web"), PORT)
}

/// A pod that greets with its own name and echoes; an endpoint of the service `web`.
pub fn greets(namespace: &str, name: &str, node: &str) -> Pod {
    let pod = Pod::new(namespace, name).on(node).label("app", "web");
    pod.runs(greeter(PORT, name)).port(Some("web"), PORT)
}

/// How often each answer was given.
pub fn tally(answers: &[String]) -> BTreeMap<&str, usize> {
    let mut tally = BTreeMap::new();
    for answer in answers {
        *tally.entry(answer.as_str()).or_insert(0) += 1;
    }
    tally
}
