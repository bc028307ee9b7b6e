//! How are the files of a new CA written, so that a crash leaves a complete CA or none?

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::AuthorityError;
use super::files::{CERT, KEY, ROOT, has_key, read_certificates, read_key};

/// Writes the key and the root of a new CA to a folder, which is created if needed. Both are on the
/// disk when this returns. After a crash, [`finish_interrupted`] completes the CA, or the next call
/// starts again.
pub(super) fn write(dir: &Path, key: &str, root: &str) -> Result<(), AuthorityError> {
    let created = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    created.map_err(|source| AuthorityError::file(dir, source))?;
    let _lock = lock(dir)?;
    for file in [ROOT, CERT, KEY].map(|name| dir.join(name)) {
        if file.exists() {
            return Err(AuthorityError::Exists { file });
        }
    }
    for (name, content, mode) in [(KEY, key, 0o600), (ROOT, root, 0o644)] {
        let file = temporary(dir, name);
        write_new(&file, content, mode).map_err(|source| AuthorityError::file(&file, source))?;
    }
    sync(dir)?;
    // Both temporary files are on the disk before the first rename, and the key is renamed first:
    // finish_interrupted completes a key without a root.
    rename_into_place(dir, KEY)?;
    rename_into_place(dir, ROOT)?;
    sync(dir)
}

/// Completes a CA whose writer crashed between its two renames.
pub(super) fn finish_interrupted(dir: &Path) -> Result<(), AuthorityError> {
    let exists = |name| dir.join(name).exists();
    let is_interrupted =
        || exists(KEY) && !exists(ROOT) && !exists(CERT) && temporary(dir, ROOT).exists();
    if !is_interrupted() {
        return Ok(());
    }
    // A process that writes the CA at this moment holds the lock until it has finished.
    let _lock = lock(dir)?;
    if !is_interrupted() {
        return Ok(());
    }
    let key = read_key(&dir.join(KEY))?;
    let roots = read_certificates(&temporary(dir, ROOT))?;
    match roots
        .first()
        .is_some_and(|root| has_key(root, key.public_key_raw()))
    {
        true => rename_into_place(dir, ROOT).and_then(|()| sync(dir)),
        // The key was replaced: reading the CA reports the missing root.
        false => Ok(()),
    }
}

/// Locks the folder against other processes until the file is dropped, also by a crash.
fn lock(dir: &Path) -> Result<File, AuthorityError> {
    let locked = File::open(dir).and_then(|folder| folder.lock().map(|()| folder));
    locked.map_err(|source| AuthorityError::file(dir, source))
}

fn temporary(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.new"))
}

fn rename_into_place(dir: &Path, name: &str) -> Result<(), AuthorityError> {
    let file = dir.join(name);
    fs::rename(temporary(dir, name), &file).map_err(|source| AuthorityError::file(&file, source))
}

fn sync(dir: &Path) -> Result<(), AuthorityError> {
    let synced = File::open(dir).and_then(|folder| folder.sync_all());
    synced.map_err(|source| AuthorityError::file(dir, source))
}

/// Replaces a file from an interrupted run.
fn write_new(file: &Path, content: &str, mode: u32) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(file)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()
}
