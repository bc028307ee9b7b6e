//! The scheduler: chooses the node of a pod.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use k8s_openapi::api::core::v1::PodSpec;

/// A node that a pod can be scheduled to.
pub(crate) struct Candidate<'a> {
    pub(crate) name: &'a str,
    pub(crate) labels: &'a BTreeMap<String, String>,
}

/// `spec.nodeName`, else the nodes that match `spec.nodeSelector` in round robin. `scheduled` counts
/// the pods scheduled before.
pub(crate) fn schedule<'a>(
    spec: &PodSpec,
    nodes: &[Candidate<'a>],
    scheduled: usize,
) -> Result<&'a str> {
    if let Some(name) = &spec.node_name {
        return match nodes.iter().find(|node| node.name == name) {
            Some(node) => Ok(node.name),
            None => bail!("spec.nodeName: there is no node {name}"),
        };
    }
    let empty = BTreeMap::new();
    let selector = spec.node_selector.as_ref().unwrap_or(&empty);
    let matches =
        |node: &&Candidate<'_>| selector.iter().all(|(k, v)| node.labels.get(k) == Some(v));
    let matching: Vec<_> = nodes.iter().filter(matches).collect();
    match matching.len() {
        0 if nodes.is_empty() => bail!("there is no node"),
        0 => bail!("spec.nodeSelector: no node has {selector:?}"),
        count => Ok(matching[scheduled % count].name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_nodes<T>(test: impl FnOnce(&[Candidate<'_>]) -> T) -> T {
        let zone = |zone: &str| BTreeMap::from([("zone".to_owned(), zone.to_owned())]);
        let (x, y) = (zone("x"), zone("y"));
        test(&[
            Candidate {
                name: "a",
                labels: &x,
            },
            Candidate {
                name: "b",
                labels: &y,
            },
            Candidate {
                name: "c",
                labels: &y,
            },
        ])
    }

    fn selector(zone: &str) -> PodSpec {
        let selector = BTreeMap::from([("zone".to_owned(), zone.to_owned())]);
        PodSpec {
            node_selector: Some(selector),
            ..PodSpec::default()
        }
    }

    #[test]
    fn node_name_takes_precedence_and_must_exist() {
        let spec = |name: &str| PodSpec {
            node_name: Some(name.to_owned()),
            ..PodSpec::default()
        };
        with_nodes(|nodes| {
            assert_eq!(schedule(&spec("b"), nodes, 0).unwrap(), "b");
            assert!(schedule(&spec("z"), nodes, 0).is_err());
        });
    }

    #[test]
    fn selector_limits_the_round_robin() {
        with_nodes(|nodes| {
            let spec = selector("y");
            let chosen: Vec<_> = (0..3)
                .map(|scheduled| schedule(&spec, nodes, scheduled).unwrap())
                .collect();
            assert_eq!(chosen, ["b", "c", "b"]);
            assert!(schedule(&selector("z"), nodes, 0).is_err());
        });
    }

    #[test]
    fn without_selector_all_nodes_take_turns() {
        with_nodes(|nodes| {
            let spec = PodSpec::default();
            let chosen: Vec<_> = (0..4)
                .map(|scheduled| schedule(&spec, nodes, scheduled).unwrap())
                .collect();
            assert_eq!(chosen, ["a", "b", "c", "a"]);
        });
    }
}
