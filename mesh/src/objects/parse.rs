//! From the bytes of a file to objects and diagnostics.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::kind::{BadField, Known, known};
use super::unreadable::{read_policy, unreadable_policies};
use super::{Object, Origin, PolicyKind};
use crate::diagnostic::{Diagnostic, ObjectRef};

/// What a file holds.
#[derive(Debug, Default)]
pub struct Parsed {
    /// The objects that could be read.
    pub objects: Vec<(Object, Origin)>,
    /// Documents that should be an object the mesh reads, and are not. Whoever holds an earlier
    /// version of such an object keeps it; where `object` is not known, that may be any object of
    /// the file.
    pub broken: Vec<Diagnostic>,
    /// What stands for policies that cannot be read: it denies. Whoever holds an earlier version of
    /// such a policy keeps that instead.
    pub unreadable: Vec<(Object, Origin)>,
    /// Documents of kinds that the mesh does not read.
    pub ignored: Vec<Diagnostic>,
}

/// Reads a file of YAML or JSON documents. Never fails as a whole unless it is not UTF-8: each
/// document stands for itself.
pub fn parse(file: &Arc<str>, bytes: &[u8]) -> Parsed {
    let mut parsed = Parsed::default();
    let at = |document| Place {
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
                BadField::syntax(message),
                &mut parsed,
            );
        }
    }
    parsed
}

/// Where in a file a value stands.
struct Place<'a> {
    file: &'a Arc<str>,
    document: usize,
    /// Path of the object within its document, for example `items[3].`.
    prefix: String,
}

impl Place<'_> {
    /// Documents that are no objects. What seems to be a policy in them has something that stands
    /// for it.
    fn unreadable<'t>(
        &self,
        texts: impl IntoIterator<Item = &'t str>,
        bad: BadField,
        parsed: &mut Parsed,
    ) {
        for text in texts {
            let policies = unreadable_policies(text, &self.name(), &bad);
            let policies = policies.into_iter().map(|policy| (policy, self.origin()));
            parsed.unreadable.extend(policies);
        }
        parsed.broken.push(self.bad(None, bad));
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

    fn bad(&self, object: Option<ObjectRef>, bad: BadField) -> Diagnostic {
        self.diagnostic(object, bad.field, bad.code, bad.message)
    }

    fn diagnostic(
        &self,
        object: Option<ObjectRef>,
        field: String,
        code: &'static str,
        message: String,
    ) -> Diagnostic {
        let field = format!("{}{}", self.prefix, field);
        Diagnostic {
            file: self.file.clone(),
            document: self.document,
            object,
            field,
            code,
            message,
        }
    }
}

/// Splits a stream at its document markers. A line that starts with `---` ends a document whatever
/// it stands in (YAML 1.2, 9.1.2), so a document that is broken cannot spoil the next one.
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

fn read_document(place: &Place<'_>, line: usize, text: &str, parsed: &mut Parsed) {
    match to_value(text) {
        Ok(Value::Null) => {}
        Ok(value) => read_object(place, value, parsed),
        Err(error) => {
            let bad = BadField::syntax(located(&error, line));
            place.unreadable([text], bad, parsed);
        }
    }
}

/// Goes through serde_yaml_ng's own value because that one refuses a key that is written twice,
/// of which every reader of the file sees another one.
fn to_value(text: &str) -> Result<Value, serde_yaml_ng::Error> {
    let yaml = serde_yaml_ng::Deserializer::from_str(text);
    let mut value = serde_yaml_ng::Value::deserialize(yaml)?;
    value.apply_merge()?;
    serde_yaml_ng::from_value(with_text_keys(value)?)
}

/// Keys of JSON are texts. `9090: {mode: STRICT}` means `"9090": ...` to kubectl, and so it does
/// here. As deep as the parser went, which bounds its depth.
fn with_text_keys(
    value: serde_yaml_ng::Value,
) -> Result<serde_yaml_ng::Value, serde_yaml_ng::Error> {
    use serde_yaml_ng::Value;
    Ok(match value {
        Value::Sequence(items) => {
            let items: Result<_, _> = items.into_iter().map(with_text_keys).collect();
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
                mapping.insert(key, with_text_keys(value)?);
            }
            Value::Mapping(mapping)
        }
        other => other,
    })
}

/// The message with the line of the file instead of that of the document.
fn located(error: &serde_yaml_ng::Error, first_line: usize) -> String {
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

fn read_object(place: &Place<'_>, value: Value, parsed: &mut Parsed) {
    let text = |key: &str| {
        let text = value.get(key).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    match known(&api_version, &kind, &value) {
        Known::Yes(typed) => {
            let reference = reference(&kind, &value);
            read_typed(place, reference, typed(value), parsed);
        }
        Known::Policy(kind) => read_as_policy(place, kind, value, parsed),
        Known::List(of) => read_list(place, of, value, parsed),
        Known::Nothing => {
            let field = if kind.is_empty() {
                "kind"
            } else {
                "apiVersion"
            };
            let message = "is missing, so it cannot be told what this is".to_owned();
            let bad = BadField::missing(field, message);
            place.unreadable([&*value.to_string()], bad, parsed);
        }
        Known::NotEnforced => {
            let message = format!(
                "{kind} ({api_version}) is NOT enforced by this version: traffic that it should \
                 refuse is let through"
            );
            let reference = Some(reference(&kind, &value));
            let diagnostic =
                place.diagnostic(reference, String::new(), "unsupported_kind", message);
            parsed.ignored.push(diagnostic);
        }
        Known::No => {
            let message = format!("the mesh does not read {kind} ({api_version}); ignored");
            let reference = Some(reference(&kind, &value));
            let diagnostic = place.diagnostic(reference, String::new(), "unknown_kind", message);
            parsed.ignored.push(diagnostic);
        }
    }
}

fn read_typed(
    place: &Place<'_>,
    reference: ObjectRef,
    object: Result<Object, BadField>,
    parsed: &mut Parsed,
) {
    match object {
        Ok(_) if reference.name.is_empty() => {
            let bad = BadField::missing("metadata.name", "is missing".to_owned());
            parsed.broken.push(place.bad(None, bad));
        }
        Ok(object) => parsed.objects.push((object, place.origin())),
        Err(bad) => {
            let reference = Some(reference).filter(|r| !r.name.is_empty());
            parsed.broken.push(place.bad(reference, bad));
        }
    }
}

fn read_as_policy(place: &Place<'_>, kind: PolicyKind, value: Value, parsed: &mut Parsed) {
    match read_policy(kind, value, &place.name()) {
        Ok(object) => parsed.objects.push((object, place.origin())),
        Err((stand_in, bad)) => {
            parsed.unreadable.push((stand_in, place.origin()));
            parsed.broken.push(place.bad(None, bad));
        }
    }
}

/// A list within a list is followed too; the parser bounds how deep they can be.
fn read_list(place: &Place<'_>, of: Option<PolicyKind>, mut value: Value, parsed: &mut Parsed) {
    let Some(Value::Array(items)) = value.get_mut("items").map(Value::take) else {
        let bad = BadField::missing("items", "is missing or no list".to_owned());
        return place.unreadable([&*value.to_string()], bad, parsed);
    };
    for (index, mut item) in items.into_iter().enumerate() {
        let prefix = format!("{}items[{index}].", place.prefix);
        let place = Place { prefix, ..*place };
        match (of, &mut item) {
            (Some(kind), Value::Object(fields)) => {
                inherit(fields, "kind", kind.as_str().into());
                inherit(fields, "apiVersion", value["apiVersion"].clone());
                read_object(&place, item, parsed);
            }
            (Some(kind), _) => read_as_policy(&place, kind, item, parsed),
            (None, _) => read_object(&place, item, parsed),
        }
    }
}

/// What the items of a list of one kind may leave to the list.
fn inherit(fields: &mut Map<String, Value>, key: &str, value: Value) {
    let field = fields.entry(key).or_insert(Value::Null);
    if field.is_null() {
        *field = value;
    }
}

/// Who a document says it is; as far as it says it.
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
