//! How an error with its causes is printed, and how a recurring one is logged once.

use std::error::Error;
use std::fmt::{self, Display};

/// Prints an error and all of its sources, separated by `": "`.
///
/// Errors of this workspace print their own part only; [`Error::source`] holds the cause.
pub struct ErrorChain<'a>(pub &'a (dyn Error + 'static));

impl Display for ErrorChain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

/// The last error of work that is repeated every few seconds. An error is logged when it appears and
/// when it changes, and not on every repetition.
#[derive(Debug, Default)]
pub struct LastError(Option<String>);

impl LastError {
    /// Records the outcome of one repetition. Returns the error chain to log: that of a new error.
    pub fn record(&mut self, error: Option<&(dyn Error + 'static)>) -> Option<&str> {
        let text = error.map(|error| ErrorChain(error).to_string());
        let is_new = text.is_some() && text != self.0;
        self.0 = text;
        self.get().filter(|_| is_new)
    }

    /// The error of the last repetition, if it failed.
    pub fn get(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn every_source_is_printed_once() {
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(ErrorChain(&error).to_string(), "outer: inner");
    }

    #[test]
    fn recurring_error_is_returned_once() {
        let (a, b) = (std::fmt::Error, Outer(std::io::Error::other("inner")));
        let mut last = LastError::default();
        assert_eq!(last.record(Some(&b)), Some("outer: inner"));
        assert_eq!(last.record(Some(&b)), None);
        assert_eq!(last.get(), Some("outer: inner"));
        assert!(last.record(Some(&a)).is_some());
        assert_eq!(last.record(None), None);
        assert_eq!(last.get(), None);
        assert!(last.record(Some(&a)).is_some());
    }
}
