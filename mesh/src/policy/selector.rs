//! Label selectors: which pods and namespaces do `matchLabels` and `matchExpressions` select?

mod parse;

use std::collections::BTreeMap;

pub(super) use parse::parse;

type Labels = BTreeMap<String, String>;

/// The label that the API server adds to every namespace.
const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// Selects what meets all requirements; everything if there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector(pub(in crate::policy) Vec<Requirement>);

/// A condition on one label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Requirement {
    pub(super) key: Box<str>,
    pub(super) test: Test,
}

/// The operators of `matchExpressions`; an entry of `matchLabels` is `In` one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Test {
    In(Vec<Box<str>>),
    /// Also met without the label.
    NotIn(Vec<Box<str>>),
    Exists,
    DoesNotExist,
}

/// The value of one label of an object.
#[derive(Clone, Copy)]
enum Label<'a> {
    Is(&'a str),
    Absent,
    /// The object is unknown, so the label may be present or absent.
    Unknown,
}

impl Selector {
    /// Whether it selects a pod with these labels.
    pub(super) fn selects(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| {
            let value = labels.get(&*requirement.key);
            requirement
                .test
                .holds(value.map_or(Label::Absent, |value| Label::Is(value)))
        })
    }

    /// Whether it selects the namespace of this name. `labels` is `None` for a namespace without an
    /// object: then only the name label is known, and a requirement on another label is not met.
    pub(super) fn selects_namespace(&self, name: &str, labels: Option<&Labels>) -> bool {
        self.0.iter().all(|requirement| {
            let label = match (&*requirement.key, labels) {
                (NAMESPACE_NAME_LABEL, _) => Label::Is(name),
                (_, None) => Label::Unknown,
                (key, Some(labels)) => match labels.get(key) {
                    Some(value) => Label::Is(value),
                    None => Label::Absent,
                },
            };
            requirement.test.holds(label)
        })
    }

    /// A label, with its value, that everything it selects has.
    pub(super) fn required_label(&self) -> Option<(&str, &str)> {
        self.0
            .iter()
            .find_map(|requirement| match &requirement.test {
                Test::In(values) => match &values[..] {
                    [value] => Some((&*requirement.key, &**value)),
                    _ => None,
                },
                _ => None,
            })
    }
}

impl Test {
    fn holds(&self, label: Label<'_>) -> bool {
        match (self, label) {
            (_, Label::Unknown) => false,
            (Test::In(values), Label::Is(value)) => values.iter().any(|v| **v == *value),
            (Test::NotIn(values), Label::Is(value)) => values.iter().all(|v| **v != *value),
            (Test::Exists, Label::Is(_)) => true,
            (Test::DoesNotExist, Label::Is(_)) => false,
            (Test::In(_) | Test::Exists, Label::Absent) => false,
            (Test::NotIn(_) | Test::DoesNotExist, Label::Absent) => true,
        }
    }
}
