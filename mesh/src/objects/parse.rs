//! Parses the bytes of a file into objects and diagnostics.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::deny_placeholder::{placeholders, read_policy};
use super::kind::{Support, support};
use super::{Object, Origin, PolicyKind};
use crate::diagnostic::Diagnostic;
use crate::id::ObjectRef;

/// The content of a file.
#[derive(Debug, Default)]
pub struct Parsed {
    /// The objects that could be read.
    pub objects: Vec<(Object, Origin)>,
    /// One error for each document that should be an object of the mesh and cannot be read. The
    /// caller keeps an earlier version of the object; if `object` is unknown, that may be any object
    /// of the file.
    pub errors: Vec<Diagnostic>,
    /// Fail-closed placeholders for policies that cannot be read. The caller prefers an earlier
    /// version of the policy.
    pub placeholders: Vec<(Object, Origin)>,
    /// One diagnostic for each document of a kind that the mesh does not read.
    pub ignored: Vec<Diagnostic>,
}

/// Reads a file of YAML or JSON documents. Each document is read by itself; only a file that is not
/// UTF-8 fails as a whole.
pub fn parse(file: &Arc<str>, bytes: &[u8]) -> Parsed {
    let mut parsed = Parsed::default();
    let at = |document| Location {
        file,
        document,
        prefix: String::new(),
    };
    match std::str::from_utf8(bytes) {
        Ok(text) => {
            let text = text.strip_prefix('\u{feff}').unwrap_or(text);
            for (document, (line, text)) in documents(text).into_iter().enumerate() {
                read_document(&at(document), line, text, &mut parsed);
            }
        }
        Err(error) => {
            let message = format!("is not UTF-8 from byte {} on", error.valid_up_to());
            at(0).unreadable(
                documents(&String::from_utf8_lossy(bytes))
                    .iter()
                    .map(|(_, text)| *text),
                &syntax_error(message),
                &mut parsed,
            );
        }
    }
    parsed
}

/// Where in a file a value is written.
struct Location<'a> {
    file: &'a Arc<str>,
    document: usize,
    /// Path of the object within its document, for example `items[3].`.
    prefix: String,
}

impl Location<'_> {
    /// Reports a document that is not an object, and adds placeholders for the policies that its
    /// texts seem to hold.
    fn unreadable<'t>(
        &self,
        texts: impl IntoIterator<Item = &'t str>,
        error: &Diagnostic,
        parsed: &mut Parsed,
    ) {
        for text in texts {
            let policies = placeholders(text, &self.name(), error);
            let policies = policies.into_iter().map(|policy| (policy, self.origin()));
            parsed.placeholders.extend(policies);
        }
        parsed.errors.push(self.locate(None, error.clone()));
    }

    fn origin(&self) -> Origin {
        Origin {
            file: self.file.clone(),
            document: self.document,
        }
    }

    /// `shop.yaml#3`, or `shop.yaml#3 items[1]`.
    fn name(&self) -> String {
        let prefix = self.prefix.trim_end_matches('.');
        let name = format!("{}#{} {prefix}", self.file, self.document);
        name.trim_end().to_owned()
    }

    /// Adds the object and this location to a diagnostic.
    fn locate(&self, object: Option<ObjectRef>, mut diagnostic: Diagnostic) -> Diagnostic {
        diagnostic.field.insert_str(0, &self.prefix);
        diagnostic.at(object, &self.origin())
    }
}

/// A document that is not YAML.
fn syntax_error(message: String) -> Diagnostic {
    Diagnostic::new("", "yaml_syntax", message)
}

/// A field without which the document cannot be read.
fn missing_field(field: &str, message: &str) -> Diagnostic {
    Diagnostic::new(field, "missing_field", message)
}

/// Splits a stream at its document markers. A line that starts with `---` ends a document in any
/// context (YAML 1.2, 9.1.2), so a syntax error does not affect the next document.
/// Returns the line on which each document starts, from 1; empty documents are left out.
fn documents(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 1, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if is_marker(line, "---") || is_marker(line, "...") {
            found.push((start_line, &text[start..offset]));
            // What follows `---` on its line belongs to the document; `...` only ends one.
            start = if is_marker(line, "---") {
                offset
            } else {
                offset + line.len()
            };
            start_line = number + 1;
        }
        offset += line.len();
    }
    found.push((start_line, &text[start..]));
    found.retain(|(_, document)| !is_blank(document));
    found
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

fn is_blank(document: &str) -> bool {
    document
        .strip_prefix("---")
        .unwrap_or(document)
        .lines()
        .all(|line| {
            let line = line.trim();
            line.is_empty() || line.starts_with('#') || line.starts_with('%')
        })
}

fn read_document(location: &Location<'_>, line: usize, text: &str, parsed: &mut Parsed) {
    match to_value(text) {
        Ok(Value::Null) => {}
        Ok(value) => read_object(location, value, parsed),
        Err(error) => {
            let error = syntax_error(message_with_file_line(&error, line));
            location.unreadable([text], &error, parsed);
        }
    }
}

/// Parses a document. Goes through serde_yaml_ng's own value, which rejects duplicate keys: readers
/// of the file would disagree about which one counts.
fn to_value(text: &str) -> Result<Value, serde_yaml_ng::Error> {
    let yaml = serde_yaml_ng::Deserializer::from_str(text);
    let mut value = serde_yaml_ng::Value::deserialize(yaml)?;
    value.apply_merge()?;
    serde_yaml_ng::from_value(with_string_keys(value)?)
}

/// Turns numeric and boolean keys into strings, as kubectl does: `9090: {mode: STRICT}` means
/// `"9090": ...`. The parser bounds the depth of the recursion.
fn with_string_keys(
    value: serde_yaml_ng::Value,
) -> Result<serde_yaml_ng::Value, serde_yaml_ng::Error> {
    use serde_yaml_ng::Value;
    Ok(match value {
        Value::Sequence(items) => {
            let items: Result<_, _> = items.into_iter().map(with_string_keys).collect();
            Value::Sequence(items?)
        }
        Value::Mapping(entries) => {
            let mut mapping = serde_yaml_ng::Mapping::with_capacity(entries.len());
            for (key, value) in entries {
                let key = match key {
                    Value::Number(number) => Value::String(number.to_string()),
                    Value::Bool(truth) => Value::String(truth.to_string()),
                    other => other,
                };
                if mapping.contains_key(&key) {
                    let message = format!("duplicate entry with key {key:?}");
                    return Err(serde::de::Error::custom(message));
                }
                mapping.insert(key, with_string_keys(value)?);
            }
            Value::Mapping(mapping)
        }
        other => other,
    })
}

/// The error message with the line in the file instead of the line in the document.
fn message_with_file_line(error: &serde_yaml_ng::Error, first_line: usize) -> String {
    let text = error.to_string();
    match error.location() {
        None => text,
        Some(at) => {
            let suffix = format!(" at line {} column {}", at.line(), at.column());
            let line = first_line + at.line() - 1;
            let message = text.replace(&suffix, "");
            format!("{message} (line {line}, column {})", at.column())
        }
    }
}

fn read_object(location: &Location<'_>, value: Value, parsed: &mut Parsed) {
    let text = |key: &str| {
        let text = value.get(key).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    match support(&api_version, &kind, &value) {
        Support::Typed(read) => {
            let reference = reference(&kind, &value);
            read_typed(location, reference, read(value), parsed);
        }
        Support::Policy(kind) => read_as_policy(location, kind, value, parsed),
        Support::List(of) => read_list(location, of, value, parsed),
        Support::Missing => {
            let field = if kind.is_empty() {
                "kind"
            } else {
                "apiVersion"
            };
            let error = missing_field(field, "is missing, so the kind of the object is unknown");
            location.unreadable([&*value.to_string()], &error, parsed);
        }
        Support::NotEnforced => {
            let message = format!(
                "{kind} ({api_version}) is NOT enforced by this version: traffic that it should \
                 refuse is allowed"
            );
            let diagnostic = Diagnostic::new("", "unsupported_kind", message);
            let reference = Some(reference(&kind, &value));
            parsed.ignored.push(location.locate(reference, diagnostic));
        }
        Support::Unused => {
            let message = format!("the mesh does not read {kind} ({api_version}); ignored");
            let diagnostic = Diagnostic::new("", "unknown_kind", message);
            let reference = Some(reference(&kind, &value));
            parsed.ignored.push(location.locate(reference, diagnostic));
        }
    }
}

fn read_typed(
    location: &Location<'_>,
    reference: ObjectRef,
    object: Result<Object, Box<Diagnostic>>,
    parsed: &mut Parsed,
) {
    match object {
        Ok(_) if reference.name.is_empty() => {
            let error = missing_field("metadata.name", "is missing");
            parsed.errors.push(location.locate(None, error));
        }
        Ok(object) => parsed.objects.push((object, location.origin())),
        Err(error) => {
            let reference = Some(reference).filter(|r| !r.name.is_empty());
            parsed.errors.push(location.locate(reference, *error));
        }
    }
}

fn read_as_policy(location: &Location<'_>, kind: PolicyKind, value: Value, parsed: &mut Parsed) {
    match read_policy(kind, value, &location.name()) {
        (policy, None) => parsed.objects.push((policy, location.origin())),
        (placeholder, Some(error)) => {
            parsed.placeholders.push((placeholder, location.origin()));
            parsed.errors.push(location.locate(None, *error));
        }
    }
}

/// Reads the items of a list. Lists within lists are read too; the parser bounds their depth.
fn read_list(
    location: &Location<'_>,
    of: Option<PolicyKind>,
    mut value: Value,
    parsed: &mut Parsed,
) {
    let Some(Value::Array(items)) = value.get_mut("items").map(Value::take) else {
        let error = missing_field("items", "is missing or not a list");
        return location.unreadable([&*value.to_string()], &error, parsed);
    };
    for (index, mut item) in items.into_iter().enumerate() {
        let prefix = format!("{}items[{index}].", location.prefix);
        let location = Location {
            prefix,
            ..*location
        };
        match (of, &mut item) {
            (Some(kind), Value::Object(fields)) => {
                inherit(fields, "kind", kind.as_str().into());
                inherit(fields, "apiVersion", value["apiVersion"].clone());
                read_object(&location, item, parsed);
            }
            (Some(kind), _) => read_as_policy(&location, kind, item, parsed),
            (None, _) => read_object(&location, item, parsed),
        }
    }
}

/// Fills in a field that an item of a list of one kind may omit.
fn inherit(fields: &mut Map<String, Value>, key: &str, value: Value) {
    let field = fields.entry(key).or_insert(Value::Null);
    if field.is_null() {
        *field = value;
    }
}

/// The reference of an object, from the fields that are readable.
fn reference(kind: &str, value: &Value) -> ObjectRef {
    let text = |pointer: &str| {
        value
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let namespace = match (kind, text("/metadata/namespace")) {
        ("Namespace" | "Node", _) => "",
        (_, "") => "default",
        (_, namespace) => namespace,
    };
    ObjectRef {
        kind: kind.into(),
        namespace: namespace.into(),
        name: text("/metadata/name").into(),
    }
}
