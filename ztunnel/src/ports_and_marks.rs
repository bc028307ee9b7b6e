//! Which ports, packet marks and routing table the daemon uses in pods and on the node.
//!
//! All but the conntrack zone are Istio's, so that a CNI, a network policy or a dashboard made for
//! Istio's ztunnel works unchanged. Sources: `src/config.rs` of istio/ztunnel for the ports,
//! `cni/pkg/config` and `cni/pkg/iptables` of istio/istio for marks, table and priority.

pub use mesh::HBONE_PORT;

/// Port in a pod's namespace to which its outgoing connections are redirected.
pub const OUTBOUND_PORT: u16 = 15001;
/// Port in a pod's namespace to which incoming plaintext connections are redirected. Connections to
/// [`HBONE_PORT`] arrive there directly.
pub const INBOUND_PLAIN_PORT: u16 = 15006;
/// The daemon's listening ports in every enrolled pod.
pub const POD_PORTS: [u16; 3] = [OUTBOUND_PORT, INBOUND_PLAIN_PORT, HBONE_PORT];

/// Default port of the admin page: config dump and log level.
pub const ADMIN_PORT: u16 = 15000;
/// Default port of the Prometheus metrics.
pub const STATS_PORT: u16 = 15020;
/// Default port of the readiness check.
pub const READINESS_PORT: u16 = 15021;

/// `SO_MARK` of every socket that the daemon opens in a pod (1337 in decimal). The pod's rules do
/// not redirect packets that carry it.
pub const DAEMON_MARK: u32 = 0x539;
/// Packet and connection mark of connections that the daemon opens to the application from the
/// client's address. Policy routing delivers the replies to the daemon.
pub const RETURN_MARK: u32 = 0x111;
/// The bits of a mark that belong to the mesh. Other components, such as a CNI, may use the rest.
pub const MARK_MASK: u32 = 0xfff;

/// Routing table with a local default route, used for replies that carry [`RETURN_MARK`].
pub const RETURN_TABLE: u8 = 100;
/// Priority of the rule that selects [`RETURN_TABLE`]: just before the main table's 32766.
pub const RETURN_RULE_PRIORITY: u32 = 32764;
/// Conntrack zone of connections that the daemon opens to the application from the client's
/// address. Istio has none; see the rules of [`crate::capture`] for the reason.
pub const CONNTRACK_ZONE: u16 = 1337;
