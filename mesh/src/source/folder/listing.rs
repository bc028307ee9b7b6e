//! Which files of a folder there are, and of which it cannot be told.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Folders within folders are followed this deep, which also ends a circle of links.
const MAX_DEPTH: usize = 16;
/// The files that are there.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) files: BTreeMap<Arc<str>, PathBuf>,
    /// What cannot be told to be a file or a folder, and why.
    pub(super) unknown: BTreeMap<Arc<str>, io::Error>,
}

/// Lists a folder and what is below it.
pub(super) fn list(dir: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    list_into(dir, "", 0, &mut listing)?;
    Ok(listing)
}

/// Takes `.yaml`, `.yml` and `.json`. Hidden names are left out: editors and Kubernetes' own
/// volumes keep unfinished things under them. Links are followed, as those volumes are made of them.
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
                // A file that is gone by now is simply not listed.
                if !is_gone(&path) {
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

fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

impl Listing {
    /// What may hold objects: a manifest, or a folder. A link under another name that leads nowhere
    /// may be anything.
    pub(super) fn unknown_files(&self) -> impl Iterator<Item = (&Arc<str>, &io::Error)> {
        self.unknown
            .iter()
            .filter(|(name, error)| is_manifest(name) || error.kind() != io::ErrorKind::NotFound)
    }

    /// Why it is not known what became of a file: nothing is known of a folder that it was in.
    pub(super) fn unknown_above(&self, file: &str) -> Option<&io::Error> {
        let folders = file.match_indices('/').map(|(at, _)| &file[..at]);
        folders.filter_map(|folder| self.unknown.get(folder)).next()
    }
}

fn is_manifest(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|e| e.to_str());
    matches!(extension, Some("yaml" | "yml" | "json"))
}
