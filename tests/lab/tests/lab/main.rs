//! The lab itself: what a cluster of network namespaces does, what it does with daemons, and what it removes.

mod cleanup;
mod cluster;
mod daemon;
