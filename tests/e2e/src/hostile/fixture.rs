//! The lab of every attack: an attacked pod, a neighbour that shares its daemon, and attackers inside and outside the
//! mesh.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use lab::{IpFamily, Lab, Location, Options};

use super::{DaemonMonitor, Neighbour, Netns, TestCa, TlsClient, Tunnel, run_in_netns};
use crate::capture::{ECHO_PORT, server};
use crate::manifest::{self, Pod, namespace};
use crate::programs::{PORT, url, words};

/// The port of the attacked pod whose program never reads.
pub const NON_READING_PORT: u16 = 7001;

/// The port of the attacked pod whose program writes without end.
pub const WRITING_PORT: u16 = 7002;

/// The identity of the attacker that is a member of the mesh.
pub const MEMBER_IDENTITY: &str = "spiffe://cluster.local/ns/shop/sa/member";

/// The receive window that the attackers' streams offer.
pub const STREAM_WINDOW_BYTES: u32 = 1 << 20;

/// An attack that takes longer is neither served nor refused by the daemon.
const ATTACK_DEADLINE: Duration = Duration::from_secs(40);

/// How much a daemon of two workers may grow under one attack: the windows of all streams of one tunnel, and as much
/// again for the tunnel's own buffers.
const MAX_GROWTH_BYTES: u64 = 400 * 1024 * 1024;

/// Descriptors that the neighbour opens and closes between two measurements.
const MAX_EXTRA_DESCRIPTORS: usize = 16;

/// A running lab for attacks.
pub struct AttackFixture {
    /// The lab.
    pub lab: Lab,
    /// The attacked pod's address.
    pub target: IpAddr,
    /// A pod outside the mesh.
    pub outsider: Netns,
    /// A pod of the mesh whose sockets bypass its own daemon.
    pub member: Netns,
    /// The lab's certificate authority.
    pub ca: TestCa,
    neighbour: Neighbour,
}

impl AttackFixture {
    /// Brings up the lab and starts the neighbour.
    ///
    /// # Errors
    /// The lab does not come up, or the neighbour has no traffic.
    pub fn up() -> Result<Self> {
        let lab = Lab::up(manifests(), Options::default())?;
        let target = lab.pod_ip("web", IpFamily::V4)?;
        let other = lab.pod_ip("other", IpFamily::V4)?;
        let netns = |pod: &str, is_marked| -> Result<Netns> {
            Ok(Netns {
                name: lab.netns(&Location::pod(pod))?,
                is_marked,
            })
        };
        let ca = TestCa::from_folder(&lab.ca_folder())?;
        let echo = SocketAddr::new(other, ECHO_PORT).to_string();
        let neighbour = Neighbour::start(&lab, "neighbour", &url(other, PORT), &echo)?;
        let (outsider, member) = (netns("outsider", false)?, netns("member", true)?);
        Ok(Self {
            target,
            outsider,
            member,
            ca,
            neighbour,
            lab,
        })
    }

    /// The attacked pod's HBONE port.
    pub fn hbone_address(&self) -> SocketAddr {
        SocketAddr::new(self.target, 15008)
    }

    /// Attacks from outside the mesh, then from inside. After each attack, the daemon must have logged and counted a
    /// failure with one of `reasons` (none are required if it is empty), and daemon and neighbour must be unaffected.
    ///
    /// # Errors
    /// The attack fails, has no such reason, or affects daemon or neighbour.
    pub fn attack(
        &mut self,
        reasons: &[&str],
        work: impl AsyncFn(&Netns, SocketAddr) -> Result<()> + Sync,
    ) -> Result<()> {
        for netns in [self.outsider.clone(), self.member.clone()] {
            self.attack_from(&netns, reasons, &work)
                .with_context(|| format!("{reasons:?} from {}", netns.name))?;
        }
        Ok(())
    }

    /// Like [`Self::attack`], from one network namespace.
    ///
    /// # Errors
    /// As [`Self::attack`].
    pub fn attack_from(
        &mut self,
        netns: &Netns,
        reasons: &[&str],
        work: &(impl AsyncFn(&Netns, SocketAddr) -> Result<()> + Sync),
    ) -> Result<()> {
        let to = self.hbone_address();
        let monitor = DaemonMonitor::start(&self.lab, "b")?;
        run_in_netns(netns, ATTACK_DEADLINE, async |netns| work(netns, to).await)?;
        if !reasons.is_empty() {
            monitor.wait_failure_of(reasons, self.source_ip(netns)?)?;
        }
        monitor.check_bounded(MAX_GROWTH_BYTES, MAX_EXTRA_DESCRIPTORS)?;
        self.neighbour.check_unaffected(&self.lab)
    }

    /// The source address of an attack.
    fn source_ip(&self, netns: &Netns) -> Result<IpAddr> {
        let pod = match netns.is_marked {
            true => "member",
            false => "outsider",
        };
        self.lab.pod_ip(pod, IpFamily::V4)
    }

    /// Like [`Self::attack`], by a member with a valid certificate and over one tunnel.
    ///
    /// # Errors
    /// As [`Self::attack`].
    pub fn attack_in_tunnel(
        &mut self,
        reasons: &[&str],
        work: impl AsyncFn(&mut Tunnel) -> Result<()> + Sync,
    ) -> Result<()> {
        let leaf = self.ca.leaf(&[MEMBER_IDENTITY])?;
        let attack = async |netns: &Netns, to| {
            let client = TlsClient::with_certificate(&leaf);
            let mut tunnel = Tunnel::open(&client, netns, to, STREAM_WINDOW_BYTES).await?;
            work(&mut tunnel).await
        };
        self.attack_from(&self.member.clone(), reasons, &attack)
    }

    /// Checks that the neighbour has been unaffected since the start.
    ///
    /// # Errors
    /// The neighbour has lost a connection or an answer.
    pub fn check_neighbour(&mut self) -> Result<()> {
        self.neighbour.check_unaffected(&self.lab)
    }
}

fn manifests() -> String {
    let listen = |port: u16, program: &str| {
        format!("socat TCP6-LISTEN:{port},ipv6only=0,reuseaddr,fork,backlog=128 {program} &")
    };
    let script = format!(
        "{} {} exec \"$@\"",
        listen(NON_READING_PORT, "SYSTEM:'sleep inf'"),
        listen(WRITING_PORT, "SYSTEM:yes")
    );
    let mut command = words(&["sh", "-c", &script, "sh"]);
    command.extend(server("web"));
    manifest::all([
        manifest::two_nodes(),
        namespace("shop", Some("ambient")),
        namespace("outside", None),
        Pod::new("shop", "web").on("b").runs(command).into(),
        Pod::new("shop", "other")
            .on("b")
            .runs(server("other"))
            .into(),
        Pod::new("shop", "neighbour").on("a").into(),
        Pod::new("shop", "member").on("a").into(),
        Pod::new("outside", "outsider").on("a").into(),
    ])
}
