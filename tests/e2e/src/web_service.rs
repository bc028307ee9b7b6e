//! The lab of most routing tests: a meshed client, and endpoints of a service `web`.

use std::collections::BTreeMap;

use anyhow::Result;
use lab::{Lab, Location, Options};

use crate::manifest::{self, Pod};
use crate::programs::{PORT, greeter, nginx};

/// Brings up a meshed client on node `a` in namespace `in`, and the objects in `more`. Namespace `out` is not in the
/// mesh.
///
/// # Errors
/// The lab does not come up.
pub fn lab_with(more: impl IntoIterator<Item = String>) -> Result<Lab> {
    let base = [
        manifest::two_nodes(),
        manifest::namespace("in", Some("ambient")),
        manifest::namespace("out", None),
        Pod::new("in", "client").on("a").into(),
    ];
    Lab::up(
        manifest::all(base.into_iter().chain(more)),
        Options::default(),
    )
}

/// The client's pod.
pub fn client() -> Location {
    Location::pod("in/client")
}

/// An endpoint of the service `web` that answers HTTP requests with its own name.
pub fn endpoint(namespace: &str, name: &str, node: &str) -> Pod {
    let pod = Pod::new(namespace, name).on(node).label("app", "web");
    pod.runs(nginx(&[PORT], name)).port(Some("web"), PORT)
}

/// An endpoint of the service `web` that sends its own name as a greeting and then echoes.
pub fn greeting_endpoint(namespace: &str, name: &str, node: &str) -> Pod {
    let pod = Pod::new(namespace, name).on(node).label("app", "web");
    pod.runs(greeter(PORT, name)).port(Some("web"), PORT)
}

/// Counts how often each answer was given.
pub fn count_answers(answers: &[String]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.as_str()).or_insert(0) += 1;
    }
    counts
}
