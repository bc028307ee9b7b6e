//! Kernel options of a pod's namespace: which IP families it has, and the options that redirected
//! connections need. All functions act on the namespace of the calling thread.

use std::{fs, io};

/// Whether IPv6 is off on the loopback device, where redirected connections arrive.
const DISABLE_IPV6: &str = "/proc/sys/net/ipv6/conf/lo/disable_ipv6";
/// Whether a connection in the queue of a closing listener moves to another listener of the same
/// port instead of being reset (Linux 5.14).
const MIGRATE_REQUESTS: &str = "/proc/sys/net/ipv4/tcp_migrate_req";
/// How long conntrack keeps the entry of an idle open connection, in seconds. Default: 5 days.
const ESTABLISHED_TIMEOUT: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
/// How long conntrack keeps the entry of an idle half-closed connection, in seconds. Default: 60.
/// Half-closed connections may be idle as long as open ones. When the entry expires, the address
/// translation ends and the application's last bytes leave untranslated.
const CLOSE_WAIT_TIMEOUT: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";

/// Which IP families a namespace has besides IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Families {
    /// IPv6 exists and is enabled on the loopback device, where redirected connections arrive.
    pub(super) v6: bool,
}

/// Reads which families exist.
pub(super) fn families() -> io::Result<Families> {
    match fs::read_to_string(DISABLE_IPV6) {
        Ok(value) => Ok(Families {
            v6: value.trim() == "0",
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Families { v6: false }),
        // Unknown must not be taken for "no IPv6", which would change the rules.
        Err(error) => Err(error),
    }
}

/// Sets the options that redirected connections need. Capture works without them except in edge
/// cases, so a failure (a read-only `/proc/sys`, an older kernel) is logged and ignored.
pub(super) fn set_options() {
    write(MIGRATE_REQUESTS, "1");
    match fs::read_to_string(ESTABLISHED_TIMEOUT) {
        Ok(timeout) => write(CLOSE_WAIT_TIMEOUT, timeout.trim()),
        Err(error) => {
            tracing::warn!(
                option = ESTABLISHED_TIMEOUT,
                %error,
                "cannot read a kernel option: half-closed connections may break after a minute \
                 without data"
            );
        }
    }
}

fn write(option: &str, value: &str) {
    if let Err(error) = fs::write(option, value) {
        tracing::warn!(option, value, %error, "cannot set a kernel option of the pod");
    }
}
