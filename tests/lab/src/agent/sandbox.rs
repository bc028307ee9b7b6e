//! Making and removing network namespaces.

use anyhow::{Context, Result};

use super::World;
use super::publish::write_atomically;
use crate::model::cluster::Cluster;
use crate::model::pod::PodEntry;
use crate::model::topology;
use crate::netns;
use crate::registry::LabDir;
use crate::tools::run_async;

async fn create(dir: &LabDir, name: &str, sysctls: &[(&str, &str)]) -> Result<()> {
    dir.register(name)?;
    run_async(&["ip", "netns", "add", name], "").await?;
    // Before there is an interface, so that every one of them starts with these.
    netns::sysctls(name, sysctls)
}

async fn batch(netns: &str, text: &str) -> Result<()> {
    run_async(&["ip", "-n", netns, "-batch", "-"], text)
        .await
        .map(drop)
}

async fn cable(a: (&str, &str), b: (&str, &str)) -> Result<()> {
    let ((netns_a, name_a), (netns_b, name_b)) = (a, b);
    run_async(
        &[
            "ip", "link", "add", "name", name_a, "netns", netns_a, "type", "veth", "peer", "name",
            name_b, "netns", netns_b,
        ],
        "",
    )
    .await
    .map(drop)
}

/// The bridge between the nodes.
pub(super) async fn fabric(world: &World) -> Result<()> {
    create(&world.dir, &world.fabric, topology::POD_SYSCTLS).await?;
    batch(&world.fabric, &topology::fabric())
        .await
        .context("the fabric")
}

/// A node's namespace, its cable to the fabric, and the routes between it and the other nodes.
pub(super) async fn node(world: &World, cluster: &Cluster, name: &str) -> Result<()> {
    let node = cluster.nodes.get(name).context("unknown")?;
    create(&world.dir, &node.netns, topology::NODE_SYSCTLS).await?;
    let port = topology::port(node.index);
    cable((&world.fabric, &port), (&node.netns, "eth0")).await?;
    batch(&world.fabric, &topology::fabric_port(node.index)).await?;
    let others = || {
        cluster
            .nodes
            .values()
            .filter(|other| other.index < node.index)
    };
    let routes: String = others()
        .map(|other| topology::route_to(other.index))
        .collect();
    batch(&node.netns, &(topology::node(node.index) + &routes)).await?;
    for other in others() {
        batch(&other.netns, &topology::route_to(node.index)).await?;
    }
    Ok(())
}

/// A pod's namespace, its cable to its node, and the file that says where it is.
pub(super) async fn pod(dir: &LabDir, entry: &PodEntry, node_netns: &str) -> Result<()> {
    if entry.host_network() {
        return Ok(());
    }
    create(dir, &entry.netns, topology::POD_SYSCTLS).await?;
    if !entry.ips.iter().any(std::net::IpAddr::is_ipv6) {
        netns::sysctls(
            &entry.netns,
            &[
                ("net/ipv6/conf/all/disable_ipv6", "1"),
                ("net/ipv6/conf/default/disable_ipv6", "1"),
            ],
        )?;
    }
    let veth = topology::veth(&entry.uid);
    cable((node_netns, &veth), (&entry.netns, "eth0")).await?;
    batch(&entry.netns, &topology::pod(&entry.ips)).await?;
    batch(
        node_netns,
        &topology::node_side(&veth, &entry.ips, &entry.node_ips),
    )
    .await?;
    // As strict as CNIs make it: a pod speaks from its own addresses only.
    let rp_filter = format!("net/ipv4/conf/{veth}/rp_filter");
    netns::sysctls(node_netns, &[(&rp_filter, "1")])?;
    let path = netns::path(&entry.netns);
    write_atomically(
        dir,
        &dir.netns_dir().join(&entry.uid),
        path.to_string_lossy().as_bytes(),
    )
}

/// Removes a pod's namespace. The cable goes first: a daemon may still hold the namespace open, and
/// the pod's address must be free for its successor at once.
pub(super) async fn remove_pod(dir: &LabDir, entry: &PodEntry, node_netns: &str) -> Result<()> {
    if entry.host_network() {
        return Ok(());
    }
    let _ = std::fs::remove_file(dir.netns_dir().join(&entry.uid));
    let veth = topology::veth(&entry.uid);
    // Absent if the sandbox was never finished.
    let _ = run_async(&["ip", "-n", node_netns, "link", "del", &veth], "").await;
    run_async(&["ip", "netns", "del", &entry.netns], "")
        .await
        .map(drop)
}
