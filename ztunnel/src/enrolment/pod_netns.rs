//! Where a pod's network namespace is found, and which pod uses which namespace.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh::WorkloadUid;

use crate::netns::NetnsId;

/// Longest path that the kernel accepts, in bytes.
const PATH_MAX: u64 = 4096;

/// Looks up the path of a pod's network namespace. Enrolment verifies by the addresses inside that
/// the namespace is the pod's.
pub trait NetnsSource: Send + Sync {
    /// The path of the namespace of the pod with this `metadata.uid`, or `None` if it is not known
    /// (yet). May block as long as a read of a local file takes.
    ///
    /// # Errors
    /// Fails if the lookup fails.
    fn path(&self, kube_uid: &str) -> io::Result<Option<PathBuf>>;
}

/// A folder with one file per pod: the file name is the pod's uid, the content the path of the
/// namespace.
#[derive(Clone, Debug)]
pub struct NetnsFolder(PathBuf);

impl NetnsFolder {
    /// Looks up namespaces in this folder.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }
}

impl NetnsSource for NetnsFolder {
    fn path(&self, kube_uid: &str) -> io::Result<Option<PathBuf>> {
        // The uid becomes a file name and must not lead out of the folder.
        if kube_uid.is_empty()
            || kube_uid.starts_with('.')
            || Path::new(kube_uid).components().count() != 1
            || kube_uid.contains('/')
        {
            return Ok(None);
        }
        let file = match fs::File::open(self.0.join(kube_uid)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut path = String::new();
        file.take(PATH_MAX).read_to_string(&mut path)?;
        let path = path.trim();
        Ok((!path.is_empty()).then(|| PathBuf::from(path)))
    }
}

/// Which pod uses each namespace: one pod per namespace. Clones share the leases.
#[derive(Clone, Debug, Default)]
pub(super) struct NetnsLeases(Arc<Mutex<HashMap<NetnsId, WorkloadUid>>>);

/// One pod's exclusive use of a namespace, until dropped.
#[derive(Debug)]
pub(super) struct NetnsLease {
    leases: NetnsLeases,
    netns: NetnsId,
}

impl NetnsLeases {
    /// Leases a namespace to a pod.
    ///
    /// # Errors
    /// Fails with the pod that holds the lease.
    pub(super) fn acquire(
        &self,
        netns: NetnsId,
        pod: &WorkloadUid,
    ) -> Result<NetnsLease, WorkloadUid> {
        let mut owners = self.lock();
        match owners.get(&netns) {
            Some(owner) => Err(owner.clone()),
            None => {
                owners.insert(netns, pod.clone());
                Ok(NetnsLease {
                    leases: self.clone(),
                    netns,
                })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NetnsId, WorkloadUid>> {
        // Every change is a single call, so a panic cannot leave the map inconsistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for NetnsLease {
    fn drop(&mut self) {
        self.leases.lock().remove(&self.netns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_named_by_the_uid_contains_the_path() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("6f1c"), "/run/netns/a\n").expect("a file");
        fs::write(folder.path().join("empty"), "\n").expect("a file");
        let source = NetnsFolder::new(folder.path());
        assert_eq!(
            source.path("6f1c").expect("readable"),
            Some(PathBuf::from("/run/netns/a"))
        );
        assert_eq!(source.path("empty").expect("readable"), None);
        assert_eq!(source.path("unknown").expect("readable"), None);
    }

    #[test]
    fn uid_with_path_components_is_unknown() {
        let folder = tempfile::tempdir().expect("a folder");
        let inside = folder.path().join("inside");
        fs::create_dir(&inside).expect("a folder");
        fs::write(folder.path().join("secret"), "/run/netns/a").expect("a file");
        let source = NetnsFolder::new(inside);
        for uid in [
            "../secret",
            "..",
            ".",
            "",
            "/etc/hostname",
            "a/../../secret",
        ] {
            assert_eq!(
                source.path(uid).expect("unknown, not an error"),
                None,
                "{uid:?}"
            );
        }
    }
}
