//! What a failure of a tunnel or stream reports: its reason, its peer, a detail and the source error.

use std::error::Error as StdError;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::reason::{Fault, Reason};

/// A failure of a tunnel or a stream.
///
/// Cheap to clone, because all callers that wait for one dial receive the same failure.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    reason: Reason,
    peer: Option<SocketAddr>,
    detail: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// The reason; its code appears in log, metric and dump.
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// The side that caused the failure, see [`Reason::fault`].
    pub fn fault(&self) -> Fault {
        self.0.reason.fault()
    }

    /// Whether a retry may succeed, see [`Reason::is_retryable`].
    pub fn is_retryable(&self) -> bool {
        self.0.reason.is_retryable()
    }

    /// The address of the tunnel's peer, if the failure belongs to a tunnel.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.0.peer
    }

    pub(crate) fn new(reason: Reason) -> Self {
        Self(Arc::new(Inner {
            reason,
            peer: None,
            detail: None,
            source: None,
        }))
    }

    pub(crate) fn with_peer(self, peer: SocketAddr) -> Self {
        self.change(|inner| inner.peer = Some(peer))
    }

    /// Adds a detail to the message. An empty detail is ignored.
    pub(crate) fn with_detail(self, detail: impl Into<String>) -> Self {
        self.change(|inner| inner.detail = Some(detail.into()).filter(|detail| !detail.is_empty()))
    }

    pub(crate) fn with_source(self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.change(|inner| inner.source = Some(Box::new(source)))
    }

    /// Changes an error that is not shared yet; a shared error keeps its content.
    fn change(mut self, f: impl FnOnce(&mut Inner)) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            f(inner);
        }
        self
    }
}

impl From<Reason> for Error {
    fn from(reason: Reason) -> Self {
        Self::new(reason)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(peer) = self.0.peer {
            write!(f, "{peer}: ")?;
        }
        write!(f, "{}", self.0.reason)?;
        if let Some(detail) = &self.0.detail {
            write!(f, " ({detail})")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("reason", &self.0.reason)
            .field("peer", &self.0.peer)
            .field("detail", &self.0.detail)
            .field("source", &self.0.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .source
            .as_deref()
            .map(|e| e as &(dyn StdError + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_omits_the_source_and_source_returns_it() {
        let error = Error::new(Reason::ConnectRefused)
            .with_peer(SocketAddr::from(([10, 0, 0, 1], 15008)))
            .with_source(std::io::Error::from_raw_os_error(111));
        let text = error.to_string();
        let source = error.source().map(ToString::to_string).unwrap_or_default();
        assert!(
            text.starts_with("10.0.0.1:15008: connection refused"),
            "{text}"
        );
        assert!(!text.contains(&source), "{text} repeats {source}");
    }

    #[test]
    fn error_is_send_and_sync_and_one_pointer_in_size() {
        fn assert_shared<T: Send + Sync + Clone>() {}
        assert_shared::<Error>();
        assert_eq!(size_of::<Error>(), size_of::<usize>());
    }
}
