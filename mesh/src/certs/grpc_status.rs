//! How is a gRPC status shown to the operator?

use std::error::Error;

use tonic::Status;

/// The message of a status and of all its causes, on one line of at most `max_chars`. The causes are
/// needed: the message "transport error" alone does not name the missing socket.
pub(super) fn error_chain(status: &Status, max_chars: usize) -> String {
    let mut text = status.message().to_owned();
    let mut cause = status.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(max_chars)
        .collect()
}
