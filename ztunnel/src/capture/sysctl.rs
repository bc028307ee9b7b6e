//! Options of the pod's kernel that redirected connections need.

use std::fs;

/// A connection that waits in the queue of a closing listener moves to another listener of the same
/// port, rather than be reset (Linux 5.14).
const MIGRATE: &str = "/proc/sys/net/ipv4/tcp_migrate_req";
/// How long the kernel remembers an open connection, in seconds: 5 days by default.
const ESTABLISHED: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
/// How long it remembers a half-closed one: 60 s by default. Half-closed connections may be silent
/// as long as open ones; when the entry goes, the translation goes, and the application's last
/// bytes leave untranslated.
const CLOSE_WAIT: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";

/// Sets the options in the namespace of this thread. Each makes an edge smoother and none is needed
/// for capture to hold, so a refusal (a read-only `/proc/sys`, an older kernel) is said and
/// survived.
pub(super) fn set() {
    write(MIGRATE, "1");
    match fs::read_to_string(ESTABLISHED) {
        Ok(timeout) => write(CLOSE_WAIT, timeout.trim()),
        Err(error) => {
            tracing::warn!(
                option = ESTABLISHED,
                %error,
                "half-closed connections may break after a minute of silence"
            );
        }
    }
}

fn write(option: &str, value: &str) {
    if let Err(error) = fs::write(option, value) {
        tracing::warn!(option, value, %error, "a kernel option of the pod could not be set");
    }
}
