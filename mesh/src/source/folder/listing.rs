//! Lists the manifests of a folder tree, and the entries that cannot be examined.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The depth limit of nested folders; also ends a cycle of links.
const MAX_DEPTH: usize = 16;

/// The entries of a folder tree.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Manifests, by path relative to the folder.
    pub(super) files: BTreeMap<Arc<str>, PathBuf>,
    /// Entries whose type cannot be determined, and why.
    pub(super) unknown: BTreeMap<Arc<str>, io::Error>,
}

/// Lists a folder tree.
pub(super) fn list(dir: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    list_into(dir, "", 0, &mut listing)?;
    Ok(listing)
}

/// Lists `.yaml`, `.yml` and `.json`. Skips hidden names: editors and Kubernetes volumes keep
/// unfinished files under them. Follows links, because Kubernetes volumes consist of links.
fn list_into(dir: &Path, prefix: &str, depth: usize, listing: &mut Listing) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let (path, name) = (entry.path(), entry.file_name());
        let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else {
            continue;
        };
        let relative = format!("{prefix}{name}");
        let meta = match fs::metadata(&path) {
            Ok(meta) => meta,
            Err(error) => {
                // A file that was deleted in the meantime is not listed.
                if !is_deleted(&path) {
                    listing.unknown.insert(relative.into(), error);
                }
                continue;
            }
        };
        if meta.is_dir() && depth < MAX_DEPTH {
            match list_into(&path, &format!("{relative}/"), depth + 1, listing) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        } else if meta.is_file() && is_manifest(name) {
            listing.files.insert(relative.into(), path);
        }
    }
    Ok(())
}

fn is_deleted(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

impl Listing {
    /// The unknown entries that may hold objects: manifests and folders. A dangling link under another
    /// name is neither.
    pub(super) fn unknown_files(&self) -> impl Iterator<Item = (&Arc<str>, &io::Error)> {
        self.unknown
            .iter()
            .filter(|(name, error)| is_manifest(name) || error.kind() != io::ErrorKind::NotFound)
    }

    /// Why the state of a file is unknown: a folder above it is an unknown entry.
    pub(super) fn unknown_above(&self, file: &str) -> Option<&io::Error> {
        let folders = file.match_indices('/').map(|(at, _)| &file[..at]);
        folders.filter_map(|folder| self.unknown.get(folder)).next()
    }
}

fn is_manifest(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str());
    matches!(extension, Some("yaml" | "yml" | "json"))
}
