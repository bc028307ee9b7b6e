//! What is wrong with the input, said so that its author can find and mend it.

use std::fmt::{self, Write};
use std::sync::Arc;

use serde::Serialize;

/// One thing that is wrong with one object, at the place where it was written.
///
/// `code` is stable and meant for machines; `message` is meant for the author of the object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Diagnostic {
    /// The file that holds the object, relative to the source folder.
    pub file: Arc<str>,
    /// Position of the YAML document in that file, from 0.
    pub document: usize,
    /// The object, as far as it could be told which one it is.
    pub object: Option<ObjectRef>,
    /// Path of the field, for example `spec.ports[0].targetPort`; empty for the whole object.
    pub field: String,
    /// Stable reason code, snake case.
    pub code: &'static str,
    /// One sentence for the author.
    pub message: String,
}

/// Kind, namespace and name of an object. Cluster-scoped objects have an empty namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ObjectRef {
    /// For example `Service`.
    pub kind: Arc<str>,
    /// Empty for cluster-scoped kinds.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.namespace {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {}/{}", self.kind, namespace, self.name),
        }
    }
}

/// One line: `shop.yaml#1: Service shop/cart: spec.ports[0].port: bad_port: ...`.
impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = OneLine(f);
        write!(line, "{}#{}: ", self.file, self.document)?;
        if let Some(object) = &self.object {
            write!(line, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(line, "{}: ", self.field)?;
        }
        write!(line, "{}: {}", self.code, self.message)
    }
}

/// Everything may quote the input; a line break in it must not forge a second log line.
struct OneLine<'a, 'f>(&'a mut fmt::Formatter<'f>);

impl Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c.is_control() {
            true => write!(self.0, "{}", c.escape_default()),
            false => self.0.write_char(c),
        })
    }
}
