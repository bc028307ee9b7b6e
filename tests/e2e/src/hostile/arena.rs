//! The place of every attack: an attacked server, a neighbour that shares its daemon, and attackers of both kinds.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result};
use lab::{IpFamily, Lab, Location, Options};

use super::{Authority, Hello, Leaf, Neighbour, Origin, Tunnel, Watch, inside};
use crate::capture::{ECHO, server};
use crate::manifest::{self, Pod, namespace};
use crate::programs::{PORT, url, words};

/// The port of the attacked pod whose program never reads.
pub const STALL: u16 = 7001;

/// The port of the attacked pod whose program writes without end.
pub const TALK: u16 = 7002;

/// The identity of the attacker that is a member of the mesh.
pub const MEMBER: &str = "spiffe://cluster.local/ns/shop/sa/member";

/// No attack goes on longer, unless the daemon neither serves nor refuses it.
const ATTACK: Duration = Duration::from_secs(40);

/// More than a daemon of two workers may grow under any one attack: the windows of the streams that one tunnel may
/// have, and as much again for the tunnel's own buffers.
const MEMORY: u64 = 400 * 1024 * 1024;

/// Descriptors that may remain for a while: what a neighbour has open between two looks.
const DESCRIPTORS: usize = 16;

/// The window that our streams give the daemon.
pub const WINDOW: u32 = 1 << 20;

/// A running lab for attacks.
pub struct Arena {
    /// The lab.
    pub lab: Lab,
    /// The attacked pod's address.
    pub target: IpAddr,
    /// A pod outside the mesh.
    pub stranger: Origin,
    /// A pod of the mesh, on its way past its own daemon.
    pub member: Origin,
    /// The lab's certificate authority.
    pub authority: Authority,
    /// A good certificate of [`MEMBER`].
    pub leaf: Leaf,
    neighbour: Neighbour,
}

impl Arena {
    /// Brings it up, with the neighbour at work.
    ///
    /// # Errors
    /// The lab does not come up.
    pub fn up() -> Result<Self> {
        let lab = Lab::up(manifests(), Options::default())?;
        let target = lab.pod_ip("web", IpFamily::V4)?;
        let other = lab.pod_ip("other", IpFamily::V4)?;
        let origin = |pod: &str, marked| -> Result<Origin> {
            Ok(Origin {
                netns: lab.netns(&Location::pod(pod))?,
                marked,
            })
        };
        let authority = Authority::of(&lab.ca_folder())?;
        let leaf = authority.leaf(&[MEMBER])?;
        let echo = SocketAddr::new(other, ECHO).to_string();
        let neighbour = Neighbour::start(&lab, "neighbour", &url(other, PORT), &echo)?;
        let (stranger, member) = (origin("stranger", false)?, origin("member", true)?);
        Ok(Self {
            target,
            stranger,
            member,
            authority,
            leaf,
            neighbour,
            lab,
        })
    }

    /// The attacked pod's HBONE port.
    pub fn hbone(&self) -> SocketAddr {
        SocketAddr::new(self.target, 15008)
    }

    /// An attack from outside and from inside the mesh, each of which the attacked daemon must explain with `reason`
    /// in log and metric, and none of which harms it or the neighbour.
    ///
    /// # Errors
    /// It was harmed, or has nothing to say.
    pub fn attack(
        &mut self,
        reason: &str,
        work: impl AsyncFn(&Origin, SocketAddr) -> Result<()> + Sync,
    ) -> Result<()> {
        for origin in [self.stranger.clone(), self.member.clone()] {
            self.attack_from(&origin, reason, &work)
                .with_context(|| format!("{reason} from {}", origin.netns))?;
        }
        Ok(())
    }

    /// As [`Self::attack`], from one place.
    ///
    /// # Errors
    /// As there.
    pub fn attack_from(
        &mut self,
        origin: &Origin,
        reason: &str,
        work: &(impl AsyncFn(&Origin, SocketAddr) -> Result<()> + Sync),
    ) -> Result<()> {
        let to = self.hbone();
        let watch = Watch::start(&self.lab, "b")?;
        inside(origin, ATTACK, async |origin| work(origin, to).await)?;
        if !reason.is_empty() {
            watch.explained_of(reason, self.address(origin)?)?;
        }
        watch.unharmed(MEMORY, DESCRIPTORS)?;
        self.neighbour.unharmed(&self.lab)
    }

    /// Where an attack comes from.
    fn address(&self, origin: &Origin) -> Result<IpAddr> {
        let pod = match origin.marked {
            true => "member",
            false => "stranger",
        };
        self.lab.pod_ip(pod, IpFamily::V4)
    }

    /// An attack by a member with a good certificate over one tunnel.
    ///
    /// # Errors
    /// As [`Self::attack`].
    pub fn attack_in_tunnel(
        &mut self,
        reason: &str,
        work: impl AsyncFn(&mut Tunnel) -> Result<()> + Sync,
    ) -> Result<()> {
        let leaf = self.authority.leaf(&[MEMBER])?;
        let attack = async |origin: &Origin, to| {
            let mut tunnel = Tunnel::open(&Hello::of(&leaf), origin, to, WINDOW).await?;
            work(&mut tunnel).await
        };
        self.attack_from(&self.member.clone(), reason, &attack)
    }

    /// That the neighbour has noticed nothing until now.
    ///
    /// # Errors
    /// It has.
    pub fn neighbour(&mut self) -> Result<()> {
        self.neighbour.unharmed(&self.lab)
    }
}

fn manifests() -> String {
    let listen = |port: u16, program: &str| {
        format!("socat TCP6-LISTEN:{port},ipv6only=0,reuseaddr,fork,backlog=128 {program} &")
    };
    let script = format!(
        "{} {} exec \"$@\"",
        listen(STALL, "SYSTEM:'sleep inf'"),
        listen(TALK, "SYSTEM:yes")
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
        Pod::new("outside", "stranger").on("a").into(),
    ])
}
