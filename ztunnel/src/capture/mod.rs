//! Redirection of a pod's TCP to the daemon, inside the pod's own network namespace.
