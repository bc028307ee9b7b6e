//! Files in the daemons' source folder, and the problems that daemons report in them.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::Lab;
use serde_json::Value;

use crate::metrics;

/// How long a change may take to be reported: milliseconds, or seconds if its inotify event was lost.
const DEADLINE: Duration = Duration::from_secs(8);

/// The number of current problems.
const PROBLEMS: &str = "ambit_configuration_problems";

/// A file that a test adds to the folder that all daemons of a lab read. Dropping the value removes it.
#[derive(Debug)]
pub struct SourceFile(PathBuf);

impl SourceFile {
    /// Writes the file.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn write(lab: &Lab, name: &str, content: impl AsRef<[u8]>) -> Result<Self> {
        let file = Self(lab.source_folder().join(name));
        file.replace(content)?;
        Ok(file)
    }

    /// Replaces the content atomically, by a rename.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn replace(&self, content: impl AsRef<[u8]>) -> Result<()> {
        // The daemons ignore hidden files.
        let name = self.0.file_name().unwrap_or_default().to_string_lossy();
        let new = self.0.with_file_name(format!(".{name}.new"));
        std::fs::write(&new, content).with_context(|| new.display().to_string())?;
        std::fs::rename(&new, &self.0).with_context(|| self.0.display().to_string())
    }

    /// Overwrites the file in place, as a shell's redirection does: a reader may see it empty or truncated.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn overwrite(&self, content: impl AsRef<[u8]>) -> Result<()> {
        std::fs::write(&self.0, content).with_context(|| self.0.display().to_string())
    }

    /// Removes the file.
    ///
    /// # Errors
    /// The file does not exist.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.0).with_context(|| self.0.display().to_string())
    }
}

impl Drop for SourceFile {
    fn drop(&mut self) {
        // If this fails, the lab's end removes the folder.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// One of the lab's own files, edited by a test. Dropping the value restores it.
#[derive(Debug)]
pub struct EditedFile {
    path: PathBuf,
    before: Vec<u8>,
}

impl EditedFile {
    /// Edits the file `name`, for example `service.shop.web.yaml`.
    ///
    /// # Errors
    /// The file does not exist.
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

/// A problem that daemons must report.
#[derive(Debug, Clone, Copy)]
pub struct ExpectedProblem<'a> {
    /// The file, relative to the folder.
    pub file: &'a str,
    /// `Kind namespace/name`; empty if the object is not known.
    pub object: &'a str,
    /// The field's path; empty for the whole object.
    pub field: &'a str,
    /// The reason code.
    pub code: &'a str,
}

impl ExpectedProblem<'_> {
    /// Waits until the daemon of `node` reports the problem in dump, metric and log. Returns its message.
    ///
    /// # Errors
    /// It does not within 8 s; the error has the problems that it reports.
    pub fn wait(&self, lab: &Lab, node: &str) -> Result<String> {
        let found = lab.wait_until(&format!("{self:?} in the dump of {node}"), DEADLINE, || {
            problems(lab, node)
                .ok()?
                .into_iter()
                .find(|problem| self.matches(problem))
        });
        let found =
            found.with_context(|| format!("reported problems: {:#?}", problems(lab, node)))?;
        metrics::wait(lab, node, PROBLEMS, &[], 1.0)?;
        lab.wait_until(&format!("{self:?} in the log of {node}"), DEADLINE, || {
            lab.daemon_log(node)
                .ok()?
                .lines()
                .any(|line| self.matches_line(line))
                .then_some(())
        })?;
        Ok(text(&found, "message"))
    }

    /// Waits until the daemon of `node` no longer reports the problem.
    ///
    /// # Errors
    /// It still does after 8 s.
    pub fn wait_gone(&self, lab: &Lab, node: &str) -> Result<()> {
        lab.wait_until(
            &format!("{self:?} to disappear from the dump of {node}"),
            DEADLINE,
            || {
                let is_reported = problems(lab, node)
                    .ok()?
                    .iter()
                    .any(|problem| self.matches(problem));
                (!is_reported).then_some(())
            },
        )
    }

    fn matches(&self, problem: &Value) -> bool {
        text(problem, "file") == self.file
            && object(problem) == self.object
            && text(problem, "field") == self.field
            && text(problem, "code") == self.code
    }

    fn matches_line(&self, line: &str) -> bool {
        [self.file, self.object, self.field, self.code]
            .iter()
            .all(|part| line.contains(part))
    }
}

/// The problems in the daemon's dump.
///
/// # Errors
/// The daemon does not respond.
pub fn problems(lab: &Lab, node: &str) -> Result<Vec<Value>> {
    let dump = lab.config_dump(node)?;
    dump.get("problems")
        .and_then(Value::as_array)
        .cloned()
        .context("no problems in the dump")
}

/// The number of problems in the daemon's metric.
///
/// # Errors
/// The daemon does not respond.
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
