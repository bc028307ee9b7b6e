//! What a daemon says of input that is wrong.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::Lab;
use serde_json::Value;

use crate::metrics;

/// A change of the folder is read within milliseconds, and within seconds where its notification was lost.
const READ: Duration = Duration::from_secs(8);

/// How many problems there are now.
const PROBLEMS: &str = "ambit_configuration_problems";

/// A file in the folder that all daemons of a lab read, which was not written by the lab. It is removed with this value.
#[derive(Debug)]
pub struct SourceFile(PathBuf);

impl SourceFile {
    /// Writes it.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn write(lab: &Lab, name: &str, content: impl AsRef<[u8]>) -> Result<Self> {
        let file = Self(lab.source_folder().join(name));
        file.replace(content)?;
        Ok(file)
    }

    /// Puts another content in its place, at once: by a rename, as everybody writes who may be read meanwhile.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn replace(&self, content: impl AsRef<[u8]>) -> Result<()> {
        // Hidden names are not read.
        let name = self.0.file_name().unwrap_or_default().to_string_lossy();
        let new = self.0.with_file_name(format!(".{name}.new"));
        std::fs::write(&new, content).with_context(|| new.display().to_string())?;
        std::fs::rename(&new, &self.0).with_context(|| self.0.display().to_string())
    }

    /// Overwrites it where it is, as a shell's redirection does: for a moment it is empty, or half of it is there.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn overwrite(&self, content: impl AsRef<[u8]>) -> Result<()> {
        std::fs::write(&self.0, content).with_context(|| self.0.display().to_string())
    }

    /// Takes it away.
    ///
    /// # Errors
    /// It is not there.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.0).with_context(|| self.0.display().to_string())
    }
}

impl Drop for SourceFile {
    fn drop(&mut self) {
        // Gone with the lab at the latest.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// One of the lab's own files, changed by somebody else; as it was again when this value is dropped.
#[derive(Debug)]
pub struct EditedFile {
    path: PathBuf,
    before: Vec<u8>,
}

impl EditedFile {
    /// Changes the text of `name`, for example `service.shop.web.yaml`.
    ///
    /// # Errors
    /// There is no such file.
    pub fn edit(lab: &Lab, name: &str, edit: impl FnOnce(&str) -> String) -> Result<Self> {
        let path = lab.source_folder().join(name);
        let before = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let after = edit(&String::from_utf8_lossy(&before));
        std::fs::write(&path, after).with_context(|| path.display().to_string())?;
        Ok(Self { path, before })
    }
}

impl Drop for EditedFile {
    fn drop(&mut self) {
        let _ = std::fs::write(&self.path, &self.before);
    }
}

/// What is to be said of a mistake.
#[derive(Debug, Clone, Copy)]
pub struct ExpectedProblem<'a> {
    /// The file, relative to the folder.
    pub file: &'a str,
    /// `Kind namespace/name`; empty if it cannot be told.
    pub object: &'a str,
    /// The field's path; empty for the whole.
    pub field: &'a str,
    /// The stable code.
    pub code: &'a str,
}

impl ExpectedProblem<'_> {
    /// Waits until the daemon of `node` reports it in its dump, its metric and its log; returns its message.
    ///
    /// # Errors
    /// It does not within 8 s; the error shows what it reports instead.
    pub fn wait(&self, lab: &Lab, node: &str) -> Result<String> {
        let found = lab.wait_until(&format!("{self:?} of {node}"), READ, || {
            problems(lab, node)
                .ok()?
                .into_iter()
                .find(|problem| self.is(problem))
        });
        let found = found.with_context(|| format!("instead: {:#?}", problems(lab, node)))?;
        metrics::wait(lab, node, PROBLEMS, &[], 1.0)?;
        lab.wait_until(&format!("{self:?} in the log of {node}"), READ, || {
            lab.daemon_log(node)
                .ok()?
                .lines()
                .any(|line| self.is_in(line))
                .then_some(())
        })?;
        Ok(text(&found, "message"))
    }

    /// Waits until the daemon of `node` no longer reports it.
    ///
    /// # Errors
    /// It still does after 8 s.
    pub fn wait_gone(&self, lab: &Lab, node: &str) -> Result<()> {
        lab.wait_until(&format!("the end of {self:?} of {node}"), READ, || {
            let still = problems(lab, node)
                .ok()?
                .iter()
                .any(|problem| self.is(problem));
            (!still).then_some(())
        })
    }

    fn is(&self, problem: &Value) -> bool {
        text(problem, "file") == self.file
            && object(problem) == self.object
            && text(problem, "field") == self.field
            && text(problem, "code") == self.code
    }

    fn is_in(&self, line: &str) -> bool {
        [self.file, self.object, self.field, self.code]
            .iter()
            .all(|part| line.contains(part))
    }
}

/// The problems that the daemon reports now.
///
/// # Errors
/// It does not answer.
pub fn problems(lab: &Lab, node: &str) -> Result<Vec<Value>> {
    let dump = lab.config_dump(node)?;
    dump.get("problems")
        .and_then(Value::as_array)
        .cloned()
        .context("no problems in the dump")
}

/// How many problems the daemon's metric says there are.
///
/// # Errors
/// It does not answer.
pub fn problem_count(lab: &Lab, node: &str) -> Result<f64> {
    Ok(metrics::sum(&metrics::scrape(lab, node)?, PROBLEMS, &[]))
}

fn text(value: &Value, key: &str) -> String {
    value
        .get(key)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

fn object(problem: &Value) -> String {
    let Some(object) = problem.get("object").filter(|object| !object.is_null()) else {
        return String::new();
    };
    let [kind, namespace, name] = ["kind", "namespace", "name"].map(|key| text(object, key));
    match &*namespace {
        "" => format!("{kind} {name}"),
        namespace => format!("{kind} {namespace}/{name}"),
    }
}
