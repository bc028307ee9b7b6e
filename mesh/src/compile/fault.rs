//! What is wrong with one object in itself.

use crate::diagnostic::{Diagnostic, ObjectRef};
use crate::objects::Origin;
use crate::policy::PolicyMessage;

/// One fault of one object. An object with a fault that is not fatal is used as far as it can be
/// understood, but only while there is no better version of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    field: String,
    code: &'static str,
    message: String,
    severity: Severity,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Severity {
    /// The object is good; its author should know this nevertheless.
    Note,
    /// Part of the object cannot be understood.
    Fault,
    /// Nothing of the object can be used, because it is not certain what it is.
    Fatal,
}

impl Fault {
    /// It says nothing against the object.
    pub(crate) fn is_note(&self) -> bool {
        self.severity == Severity::Note
    }

    /// As part of the report of a policy.
    pub(crate) fn message(&self) -> PolicyMessage {
        PolicyMessage {
            field: self.field.clone(),
            code: self.code,
            message: self.message.clone(),
        }
    }

    pub(crate) fn at(self, object: ObjectRef, origin: &Origin) -> Diagnostic {
        Diagnostic {
            file: origin.file.clone(),
            document: origin.document,
            object: Some(object),
            field: self.field,
            code: self.code,
            message: self.message,
        }
    }
}

/// Collects the faults of one object while it is read.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<Fault>);

impl Faults {
    pub(crate) fn add(&mut self, field: impl Into<String>, code: &'static str, message: String) {
        self.push(field.into(), code, message, Severity::Fault);
    }

    pub(crate) fn fatal(&mut self, field: impl Into<String>, code: &'static str, message: String) {
        self.push(field.into(), code, message, Severity::Fatal);
    }

    /// Says something that is not against the object.
    pub(crate) fn note(&mut self, field: impl Into<String>, code: &'static str, message: String) {
        self.push(field.into(), code, message, Severity::Note);
    }

    fn push(&mut self, field: String, code: &'static str, message: String, severity: Severity) {
        self.0.push(Fault {
            field,
            code,
            message,
            severity,
        });
    }

    /// Takes over what was found before.
    pub(crate) fn extend(&mut self, faults: &[Fault]) {
        self.0.extend_from_slice(faults);
    }

    pub(crate) fn is_fatal(&self) -> bool {
        self.0.iter().any(|fault| fault.severity == Severity::Fatal)
    }

    pub(crate) fn into_vec(self) -> Vec<Fault> {
        self.0
    }
}
