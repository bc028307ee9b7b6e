//! Creates and removes the network namespaces of the fabric, of nodes and of pods.

use anyhow::{Context, Result};
use futures_util::future::try_join_all;

use super::LabContext;
use super::publish::write_atomically;
use crate::model::cluster::{Cluster, NodeEntry};
use crate::model::pod::PodEntry;
use crate::model::topology;
use crate::netns;
use crate::registry::LabDir;
use crate::tools::run_async;

/// Creates the bridge between the nodes.
pub(super) async fn create_fabric(context: &LabContext) -> Result<()> {
    create_netns(&context.dir, &context.fabric, topology::POD_SYSCTLS).await?;
    ip_batch(&context.fabric, &topology::fabric())
        .await
        .context("the fabric")
}

/// Creates the namespaces of these nodes, their links to the fabric, and the routes between them and
/// the other nodes.
pub(super) async fn create_nodes(
    context: &LabContext,
    cluster: &Cluster,
    created: &[String],
) -> Result<()> {
    let is_created = |name: &String| created.contains(name);
    let nodes = cluster.nodes.iter().filter(|(name, _)| is_created(name));
    let create = nodes.map(async |(name, node)| {
        create_node(context, cluster, node)
            .await
            .with_context(|| format!("node {name}"))
    });
    try_join_all(create).await?;
    let routes: String = cluster
        .nodes
        .iter()
        .filter(|(name, _)| is_created(name))
        .map(|(_, node)| topology::route_to(node.index))
        .collect();
    if !routes.is_empty() {
        let existing = cluster.nodes.iter().filter(|(name, _)| !is_created(name));
        try_join_all(existing.map(|(_, node)| ip_batch(&node.netns, &routes))).await?;
    }
    Ok(())
}

async fn create_node(context: &LabContext, cluster: &Cluster, node: &NodeEntry) -> Result<()> {
    create_netns(&context.dir, &node.netns, topology::NODE_SYSCTLS).await?;
    let port = topology::port(node.index);
    let link = topology::veth_pair(&port, ("eth0", &node.netns));
    let fabric = link + &topology::fabric_port(node.index);
    ip_batch(&context.fabric, &fabric).await?;
    let routes: String = cluster
        .nodes
        .values()
        .filter(|other| other.index != node.index)
        .map(|other| topology::route_to(other.index))
        .collect();
    ip_batch(&node.netns, &(topology::node(node.index) + &routes)).await
}

/// Creates a pod's namespace, its link to its node, and the file with the namespace's path.
pub(super) async fn create_pod(dir: &LabDir, entry: &PodEntry, node_netns: &str) -> Result<()> {
    if entry.host_network() {
        return Ok(());
    }
    create_netns(dir, &entry.netns, topology::POD_SYSCTLS).await?;
    if !entry.ips.iter().any(std::net::IpAddr::is_ipv6) {
        netns::set_sysctls(
            &entry.netns,
            &[
                ("net/ipv6/conf/all/disable_ipv6", "1"),
                ("net/ipv6/conf/default/disable_ipv6", "1"),
            ],
        )?;
    }
    // The kernel has these sysctls only once conntrack is loaded.
    let _ = netns::set_sysctls(&entry.netns, topology::POD_CONNTRACK_SYSCTLS);
    let veth = topology::veth(&entry.uid);
    let link = topology::veth_pair("eth0", (&veth, node_netns));
    ip_batch(&entry.netns, &(link + &topology::pod(&entry.ips))).await?;
    ip_batch(
        node_netns,
        &topology::node_side(&veth, &entry.ips, &entry.node_ips),
    )
    .await?;
    // Strict, as CNI plugins set it: a pod can send from its own addresses only.
    let rp_filter = format!("net/ipv4/conf/{veth}/rp_filter");
    netns::set_sysctls(node_netns, &[(&rp_filter, "1")])?;
    let path = netns::path(&entry.netns);
    write_atomically(
        dir,
        &dir.netns_dir().join(&entry.uid),
        path.to_string_lossy().as_bytes(),
    )
}

/// Removes a pod's namespace. The link is removed first: a daemon may still hold the namespace open,
/// and the next pod with this address must be able to use it at once.
pub(super) async fn remove_pod(dir: &LabDir, entry: &PodEntry, node_netns: &str) -> Result<()> {
    if entry.host_network() {
        return Ok(());
    }
    let _ = std::fs::remove_file(dir.netns_dir().join(&entry.uid));
    let veth = topology::veth(&entry.uid);
    // The link does not exist if the creation of the sandbox failed.
    let _ = run_async(&["ip", "-n", node_netns, "link", "del", &veth], "").await;
    run_async(&["ip", "netns", "del", &entry.netns], "")
        .await
        .map(drop)
}

async fn create_netns(dir: &LabDir, name: &str, sysctls: &[(&str, &str)]) -> Result<()> {
    dir.register(name)?;
    run_async(&["ip", "netns", "add", name], "").await?;
    // Before any interface is created, so that each one starts with these settings.
    netns::set_sysctls(name, sysctls)
}

/// Runs `ip` commands, one per line, in a namespace.
async fn ip_batch(netns: &str, commands: &str) -> Result<()> {
    run_async(&["ip", "-n", netns, "-batch", "-"], commands)
        .await
        .map(drop)
}
