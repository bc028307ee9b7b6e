//! Tests of the lab itself: the cluster of network namespaces, its daemons, and its removal.

mod cleanup;
mod cluster;
mod daemon;
