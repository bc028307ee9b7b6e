//! The socket.

use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::World;
use super::event::Event;
use crate::protocol::{Request, Status};

/// A manifest is at most this long, with its JSON quoting.
const MAX_REQUEST: u64 = 16 * 1024 * 1024;

/// Accepts connections for as long as the agent lives.
pub(super) async fn listen(
    listener: UnixListener,
    world: Rc<World>,
    status: watch::Receiver<Status>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn_local(connection(stream, Rc::clone(&world), status.clone()));
                }
                // Out of file descriptors, for which others must end first.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn connection(stream: UnixStream, world: Rc<World>, mut status: watch::Receiver<Status>) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read.take(MAX_REQUEST));
    let mut owner = false;
    loop {
        let mut line = String::new();
        lines.get_mut().set_limit(MAX_REQUEST);
        match lines.read_line(&mut line).await {
            Ok(length) if length > 0 => {}
            _ => break,
        }
        let answer = match serde_json::from_str(&line) {
            Ok(Request::Own) => {
                owner = true;
                Ok(Value::Null)
            }
            Ok(Request::Status { after, wait_ms }) => {
                changed(&mut status, after, Duration::from_millis(wait_ms)).await
            }
            Ok(request) => forward(&world, request).await,
            Err(error) => Err(format!("not a request: {error}")),
        };
        let Ok(mut text) = serde_json::to_string(&answer) else {
            break;
        };
        text.push('\n');
        if write.write_all(text.as_bytes()).await.is_err() {
            break;
        }
    }
    if owner {
        let _ = world.events.send(Event::OwnerGone).await;
    }
}

/// The status once it is newer than `after`, or when the wait is over.
async fn changed(
    status: &mut watch::Receiver<Status>,
    after: Option<u64>,
    wait: Duration,
) -> Result<Value, String> {
    if let Some(after) = after {
        let newer = status.wait_for(|status| status.generation > after);
        // At the end of the wait the answer is what there is.
        let _ = tokio::time::timeout(wait, newer).await;
    }
    serde_json::to_value(&*status.borrow()).map_err(|error| error.to_string())
}

async fn forward(world: &World, request: Request) -> Result<Value, String> {
    let (answer, answered) = oneshot::channel();
    let event = match request {
        Request::Down => Event::Down(answer),
        request => Event::Request(request, answer),
    };
    let gone = || "the lab is going down".to_owned();
    world.events.send(event).await.map_err(|_| gone())?;
    answered.await.map_err(|_| gone())?
}
