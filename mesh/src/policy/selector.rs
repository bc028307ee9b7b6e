//! Label selectors: `matchLabels` and `matchExpressions`.

use std::collections::BTreeMap;

use crate::model::Namespace;

/// The label that the API server gives to every namespace, whatever its manifest says.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// All of its requirements hold; without any, it selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Selector(pub(in crate::policy) Vec<Requirement>);

/// What one label has to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Requirement {
    pub(super) key: Box<str>,
    pub(super) test: Test,
}

/// The operators of `matchExpressions`; an entry of `matchLabels` is `In` one value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Test {
    In(Vec<Box<str>>),
    /// Also holds without the label.
    NotIn(Vec<Box<str>>),
    Exists,
    DoesNotExist,
}

/// What is known of one label of an object.
#[derive(Clone, Copy)]
enum Label<'a> {
    Is(&'a str),
    Absent,
    /// The object itself is not known, so it is not certain that the label is absent.
    Unknown,
}

impl Selector {
    /// Whether it selects a pod with these labels.
    pub(super) fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| {
            let value = labels.get(&*requirement.key);
            requirement
                .test
                .holds(value.map_or(Label::Absent, |value| Label::Is(value)))
        })
    }

    /// Whether it selects the namespace of this name. Of a namespace without an object only the
    /// name is certain, and what is not certain does not hold.
    pub(super) fn selects_namespace(&self, name: &str, namespace: Option<&Namespace>) -> bool {
        self.0.iter().all(|requirement| {
            let label = match (&*requirement.key, namespace) {
                (NAMESPACE_NAME, _) => Label::Is(name),
                (_, None) => Label::Unknown,
                (key, Some(namespace)) => match namespace.labels.get(key) {
                    Some(value) => Label::Is(value),
                    None => Label::Absent,
                },
            };
            requirement.test.holds(label)
        })
    }

    /// A label that everything it selects has.
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
