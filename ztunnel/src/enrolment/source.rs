//! Where a pod's network namespace is found.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The longest path that the kernel accepts.
const PATH_MAX: u64 = 4096;

/// Knows the network namespaces of this node's pods. It is only asked where to look: that what is
/// found there is the pod's own is proven by the addresses in it.
pub trait NetnsSource: Send + Sync {
    /// The path of the namespace of the pod with this `metadata.uid`, if the source knows it. May
    /// block for as long as a read of a local file takes.
    ///
    /// # Errors
    /// Fails if the source cannot be asked.
    fn path(&self, kube_uid: &str) -> io::Result<Option<PathBuf>>;
}

/// A folder with one file per pod: its name is the pod's uid, its content the path of the
/// namespace.
#[derive(Clone, Debug)]
pub struct NetnsFolder(PathBuf);

impl NetnsFolder {
    /// A source for this folder.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }
}

impl NetnsSource for NetnsFolder {
    fn path(&self, kube_uid: &str) -> io::Result<Option<PathBuf>> {
        // A uid is a file's name here: anything that could lead out of the folder is no pod's.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_named_by_the_uid_holds_the_path() {
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
    fn a_uid_never_leads_out_of_the_folder() {
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
                source.path(uid).expect("refused, not failed"),
                None,
                "{uid:?}"
            );
        }
    }
}
