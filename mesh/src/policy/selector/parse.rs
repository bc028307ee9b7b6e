//! Reads label selectors from a document.
//!
//! Keys and values are checked as the API server checks them: `NotIn` with a value that no label can
//! have would select everything.

use serde_json::Value;

use super::{Requirement, Selector, Test};
use crate::policy::document::{Field, Reader};

/// Reads a selector; `None` if any part of it is invalid.
pub(in crate::policy) fn parse(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Selector> {
    let before = reader.count();
    field.expect_keys(&["matchLabels", "matchExpressions"], reader);
    let mut requirements = Vec::new();
    let labels = field.get_or_null("matchLabels");
    match labels.value {
        Value::Null => {}
        Value::Object(pairs) => {
            for key in pairs.keys() {
                requirements.extend(one_value(key, &labels.get_or_null(key), reader));
            }
        }
        _ => labels.error("bad_field", "is not an object".to_owned(), reader),
    }
    for item in field.items("matchExpressions", reader) {
        requirements.extend(expression(&item, reader));
    }
    (reader.count() == before).then_some(Selector(requirements))
}

fn one_value(key: &str, field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Requirement> {
    let key = self::key(key, field, reader);
    let value = value(field, reader);
    Some(Requirement {
        key: key?,
        test: Test::In(vec![value?]),
    })
}

fn expression(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Requirement> {
    field.expect_keys(&["key", "operator", "values"], reader);
    let at = field.get_or_null("key");
    let key = at.text(reader).and_then(|text| key(text, &at, reader));
    let values: Vec<Option<Box<str>>> = field
        .items("values", reader)
        .map(|item| value(&item, reader))
        .collect();
    let values: Option<Vec<_>> = values.into_iter().collect();
    let operator = field.get_or_null("operator");
    let test = match (operator.text(reader)?, values?) {
        ("In", values) if !values.is_empty() => Test::In(values),
        ("NotIn", values) if !values.is_empty() => Test::NotIn(values),
        ("Exists", values) if values.is_empty() => Test::Exists,
        ("DoesNotExist", values) if values.is_empty() => Test::DoesNotExist,
        (name @ ("In" | "NotIn"), _) => {
            let message = format!("{name} needs values");
            field.error("bad_selector", message, reader);
            return None;
        }
        (name @ ("Exists" | "DoesNotExist"), _) => {
            let message = format!("{name} takes no values");
            field.error("bad_selector", message, reader);
            return None;
        }
        (name, _) => {
            let message = format!("{name:?} is none of In, NotIn, Exists and DoesNotExist");
            operator.error("bad_selector", message, reader);
            return None;
        }
    };
    Some(Requirement { key: key?, test })
}

/// A label key: a name, before it perhaps a DNS subdomain and a slash.
fn key(text: &str, field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Box<str>> {
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    let legal = !name.is_empty() && is_name(name) && prefix.is_none_or(is_subdomain);
    if !legal {
        let message = format!("{text:?} is not a valid label key");
        field.error("bad_label", message, reader);
    }
    legal.then(|| text.into())
}

fn value(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Box<str>> {
    let text = field.text(reader)?;
    if !is_name(text) {
        let message = format!("{text:?} is not a valid label value");
        field.error("bad_label", message, reader);
        return None;
    }
    Some(text.into())
}

/// Up to 63 letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit; or
/// nothing.
fn is_name(text: &str) -> bool {
    let edge = |b: Option<u8>| b.is_none_or(|b| b.is_ascii_alphanumeric());
    text.len() <= 63
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        && edge(text.bytes().next())
        && edge(text.bytes().last())
}

fn is_subdomain(text: &str) -> bool {
    (1..=253).contains(&text.len())
        && text.split('.').all(|label| {
            let edge = |b: Option<u8>| b.is_some_and(|b| b != b'-');
            label
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && edge(label.bytes().next())
                && edge(label.bytes().last())
        })
}
