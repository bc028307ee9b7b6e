//! What is wrong with an object of the input, and where it was written.
//!
//! Every reader of the crate reports with the one type [`Diagnostic`]: the YAML parser, the
//! compiler, the policies and the folder source. A reader of a single object collects its findings
//! in [`Diagnostics`]; its caller adds the reference of the object and its position in the file.

use std::fmt::{self, Write};
use std::sync::Arc;

use serde::Serialize;

use crate::id::ObjectRef;

/// Where an object is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Origin {
    /// File, relative to the source folder.
    pub file: Arc<str>,
    /// Position of the YAML document in the file, from 0.
    pub document: usize,
}

/// One finding about one object.
///
/// `code` is stable and meant for machines; `message` is meant for the author of the object.
/// Serialized as in the config dump, without the severity.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Diagnostic {
    /// Where the object is written. The default until [`Diagnostic::at`] fills it in.
    #[serde(flatten)]
    pub origin: Origin,
    /// The object, if it could be identified.
    pub object: Option<ObjectRef>,
    /// Path of the field, for example `spec.ports[0].targetPort`; empty for the whole object.
    pub field: String,
    /// Stable reason code, snake case.
    pub code: &'static str,
    /// One sentence for the author.
    pub message: String,
    /// How much of the object is still usable.
    #[serde(skip)]
    pub severity: Severity,
}

/// How much of an object is still usable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object is valid; its author should know this nevertheless.
    Note,
    /// Part of the object cannot be understood. The rest is used, but only while there is no
    /// better version of the object.
    Error,
    /// Nothing of the object can be used, because its identity is not certain.
    Fatal,
}

impl Diagnostic {
    /// An error that belongs to no object yet.
    pub fn new(field: impl Into<String>, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            origin: Origin::default(),
            object: None,
            field: field.into(),
            code,
            message: message.into(),
            severity: Severity::Error,
        }
    }

    /// The same finding, about this object at this place.
    #[must_use]
    pub fn at(self, object: impl Into<Option<ObjectRef>>, origin: &Origin) -> Self {
        Self {
            origin: origin.clone(),
            object: object.into(),
            ..self
        }
    }

    /// The object is valid.
    pub fn is_note(&self) -> bool {
        self.severity == Severity::Note
    }
}

/// One line: `shop.yaml#1: Service shop/cart: spec.ports[0].port: bad_port: ...`.
impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = OneLine(f);
        write!(line, "{}#{}: ", self.origin.file, self.origin.document)?;
        if let Some(object) = &self.object {
            write!(line, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(line, "{}: ", self.field)?;
        }
        write!(line, "{}: {}", self.code, self.message)
    }
}

/// Escapes control characters. Every part may quote the input, and a line break in it must not
/// forge a second log line.
struct OneLine<'a, 'f>(&'a mut fmt::Formatter<'f>);

impl Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c.is_control() {
            true => write!(self.0, "{}", c.escape_default()),
            false => self.0.write_char(c),
        })
    }
}

/// Collects the findings about one object while it is read.
#[derive(Debug, Default)]
pub(crate) struct Diagnostics(Vec<Diagnostic>);

impl Diagnostics {
    /// Adds an error: part of the object cannot be understood.
    pub(crate) fn error(&mut self, field: impl Into<String>, code: &'static str, message: String) {
        self.push(field.into(), code, message, Severity::Error);
    }

    /// Adds an error after which nothing of the object can be used.
    pub(crate) fn fatal(&mut self, field: impl Into<String>, code: &'static str, message: String) {
        self.push(field.into(), code, message, Severity::Fatal);
    }

    /// Adds a note about a valid object.
    pub(crate) fn note(&mut self, field: impl Into<String>, code: &'static str, message: String) {
        self.push(field.into(), code, message, Severity::Note);
    }

    fn push(&mut self, field: String, code: &'static str, message: String, severity: Severity) {
        let diagnostic = Diagnostic::new(field, code, message);
        self.0.push(Diagnostic {
            severity,
            ..diagnostic
        });
    }

    /// Adds findings of an earlier reader.
    pub(crate) fn extend(&mut self, diagnostics: &[Diagnostic]) {
        self.0.extend_from_slice(diagnostics);
    }

    /// Nothing of the object can be used.
    pub(crate) fn is_fatal(&self) -> bool {
        let mut severities = self.0.iter().map(|diagnostic| diagnostic.severity);
        severities.any(|severity| severity == Severity::Fatal)
    }

    pub(crate) fn into_vec(self) -> Vec<Diagnostic> {
        self.0
    }
}
