//! Access to the fields of a document, with the path of each field for diagnostics.

use std::fmt;

use serde_json::Value;

use crate::diagnostic::Diagnostics;

/// Collects diagnostics, and counts them.
pub(super) struct Reader<'f> {
    diagnostics: &'f mut Diagnostics,
    count: usize,
}

impl<'f> Reader<'f> {
    pub(super) fn new(diagnostics: &'f mut Diagnostics) -> Self {
        Self {
            diagnostics,
            count: 0,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn has_error(&self) -> bool {
        self.count > 0
    }

    pub(super) fn error(&mut self, field: impl Into<String>, code: &'static str, message: String) {
        self.count += 1;
        self.diagnostics.error(field, code, message);
    }

    /// Adds a note.
    pub(super) fn note(&mut self, field: impl Into<String>, code: &'static str, message: String) {
        self.diagnostics.note(field, code, message);
    }

    /// Reports an unknown field: it may be a misspelt known one.
    pub(super) fn unknown_field(&mut self, path: String) {
        let message = "is not a known field".to_owned();
        self.error(path, "unknown_field", message);
    }
}

/// A value and its position. The path is only formatted for a diagnostic.
#[derive(Clone, Copy)]
pub(super) struct Field<'a> {
    pub(super) value: &'a Value,
    parent: Option<&'a Field<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Key(&'a str),
    /// An item of the list of that name.
    Item(&'a str, usize),
}

impl<'a> Field<'a> {
    /// A top-level field of the document.
    pub(super) fn top(key: &'a str, value: Option<&'a Value>) -> Self {
        Self {
            value: value.unwrap_or(&Value::Null),
            parent: None,
            step: Step::Key(key),
        }
    }

    fn child(&'a self, value: &'a Value, step: Step<'a>) -> Self {
        Self {
            value,
            parent: Some(self),
            step,
        }
    }

    /// A field of an object; `None` if it is absent or null, which are equal in Kubernetes.
    pub(super) fn get(&'a self, key: &'a str) -> Option<Self> {
        let field = self.get_or_null(key);
        (!field.value.is_null()).then_some(field)
    }

    /// A field of an object, null if it is absent.
    pub(super) fn get_or_null(&'a self, key: &'a str) -> Self {
        let value = self.value.get(key).unwrap_or(&Value::Null);
        self.child(value, Step::Key(key))
    }

    /// The items of a list, which may be absent.
    pub(super) fn items(
        &'a self,
        key: &'a str,
        reader: &mut Reader<'_>,
    ) -> impl Iterator<Item = Self> + use<'a> {
        let items: &[Value] = match self.get(key) {
            None => &[],
            Some(field) => match field.value {
                Value::Array(items) => items,
                _ => {
                    field.error("bad_field", "is not a list".to_owned(), reader);
                    &[]
                }
            },
        };
        items
            .iter()
            .enumerate()
            .map(move |(i, item)| self.child(item, Step::Item(key, i)))
    }

    /// Whether the value is an empty list or object.
    pub(super) fn is_empty(&self) -> bool {
        match self.value {
            Value::Array(items) => items.is_empty(),
            Value::Object(fields) => fields.is_empty(),
            _ => false,
        }
    }

    /// The value of a required string.
    pub(super) fn text(&self, reader: &mut Reader<'_>) -> Option<&'a str> {
        let text = self.value.as_str();
        if text.is_none() {
            let message = match self.value {
                Value::Null => "is missing".to_owned(),
                other => format!("{other} is not a string"),
            };
            self.error("bad_field", message, reader);
        }
        text
    }

    /// Reports unknown fields, and a value that is not an object; false for the latter. A missing value is
    /// an empty object.
    pub(super) fn expect_keys(&self, known: &[&str], reader: &mut Reader<'_>) -> bool {
        match self.value {
            Value::Null => true,
            Value::Object(fields) => {
                for key in fields.keys().filter(|key| !known.contains(&key.as_str())) {
                    reader.unknown_field(format!("{self}.{key}"));
                }
                true
            }
            _ => {
                self.error("bad_field", "is not an object".to_owned(), reader);
                false
            }
        }
    }

    /// Reports an item that is null. It must not count as the empty item, which admits everything.
    pub(super) fn expect_present(&self, reader: &mut Reader<'_>) -> bool {
        if self.value.is_null() {
            self.error("empty_item", "is empty".to_owned(), reader);
        }
        !self.value.is_null()
    }

    pub(super) fn error(&self, code: &'static str, message: String, reader: &mut Reader<'_>) {
        reader.error(self.to_string(), code, message);
    }
}

/// As in `spec.ingress[0].from[1].ipBlock.cidr`.
impl fmt::Display for Field<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            write!(f, "{parent}.")?;
        }
        match self.step {
            Step::Key(key) => f.write_str(key),
            Step::Item(list, index) => write!(f, "{list}[{index}]"),
        }
    }
}
