//! Serves the agent's unix socket.

use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::LabContext;
use super::events::Event;
use crate::protocol::{Request, Status};

/// Limit of a request line, and so of a manifest in JSON quoting.
const MAX_REQUEST_BYTES: u64 = 16 * 1024 * 1024;

/// Accepts connections until the task is aborted.
pub(super) async fn listen(
    listener: UnixListener,
    context: Rc<LabContext>,
    status: watch::Receiver<Status>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn_local(connection(stream, Rc::clone(&context), status.clone()));
                }
                // Out of file descriptors: other connections must close first.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn connection(
    stream: UnixStream,
    context: Rc<LabContext>,
    mut status: watch::Receiver<Status>,
) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read.take(MAX_REQUEST_BYTES));
    let mut is_owner = false;
    loop {
        let mut line = String::new();
        lines.get_mut().set_limit(MAX_REQUEST_BYTES);
        match lines.read_line(&mut line).await {
            Ok(length) if length > 0 => {}
            _ => break,
        }
        let response = match serde_json::from_str(&line) {
            Ok(Request::Own) => {
                is_owner = true;
                Ok(Value::Null)
            }
            Ok(Request::Status { after, wait_ms }) => {
                next_status(&mut status, after, Duration::from_millis(wait_ms)).await
            }
            Ok(request) => forward(&context, request).await,
            Err(error) => Err(format!("not a request: {error}")),
        };
        let Ok(mut text) = serde_json::to_string(&response) else {
            break;
        };
        text.push('\n');
        if write.write_all(text.as_bytes()).await.is_err() {
            break;
        }
    }
    if is_owner {
        let _ = context.events.send(Event::OwnerGone).await;
    }
}

/// The status once its generation is above `after`, or after `wait`.
async fn next_status(
    status: &mut watch::Receiver<Status>,
    after: Option<u64>,
    wait: Duration,
) -> Result<Value, String> {
    if let Some(after) = after {
        let newer = status.wait_for(|status| status.generation > after);
        // After the wait the response is the current status.
        let _ = tokio::time::timeout(wait, newer).await;
    }
    serde_json::to_value(&*status.borrow()).map_err(|error| error.to_string())
}

async fn forward(context: &LabContext, request: Request) -> Result<Value, String> {
    let (reply, response) = oneshot::channel();
    let event = match request {
        Request::Down => Event::Down(reply),
        request => Event::Request(request, reply),
    };
    let going_down = || "the lab is going down".to_owned();
    context.events.send(event).await.map_err(|_| going_down())?;
    response.await.map_err(|_| going_down())?
}
