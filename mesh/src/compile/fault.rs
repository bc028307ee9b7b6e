//! What is wrong with one object in itself.

use crate::objects::Origin;
use crate::problem::{ObjectRef, Problem};

/// One fault of one object. An object with a fault that is not fatal is used as far as it can be
/// understood, but only while there is no better version of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    field: String,
    code: &'static str,
    message: String,
    /// Nothing of the object can be used, because it is not certain what it is.
    fatal: bool,
}

impl Fault {
    pub(crate) fn at(self, object: ObjectRef, origin: &Origin) -> Problem {
        Problem {
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
        self.0.push(Fault {
            field: field.into(),
            code,
            message,
            fatal: false,
        });
    }

    pub(crate) fn fatal(&mut self, field: impl Into<String>, code: &'static str, message: String) {
        self.0.push(Fault {
            field: field.into(),
            code,
            message,
            fatal: true,
        });
    }

    pub(crate) fn is_fatal(&self) -> bool {
        self.0.iter().any(|fault| fault.fatal)
    }

    pub(crate) fn into_vec(self) -> Vec<Fault> {
        self.0
    }
}
