//! Whether the daemon is ready: the startup tasks that are pending, and the port that reports them.
//!
//! A data-plane thread serves the port, so a response shows that the data plane runs.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use component::admin::{self, Request, Response, method_not_allowed, not_found, text};
use http::{Method, StatusCode};
use tokio_util::sync::CancellationToken;

/// The tasks that must complete before the daemon is ready. Clones of the `Arc` share them.
#[derive(Debug, Default)]
pub struct Readiness {
    /// How often each task is pending.
    pending: Mutex<BTreeMap<String, usize>>,
}

impl Readiness {
    /// Without a pending task.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Registers a task that must complete first. It completes when the result is dropped.
    pub fn register_task(self: &Arc<Self>, name: impl Into<String>) -> PendingTask {
        let name = name.into();
        *self.lock().entry(name.clone()).or_default() += 1;
        PendingTask {
            readiness: self.clone(),
            name,
        }
    }

    /// The names of the pending tasks, sorted.
    pub fn pending_tasks(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, usize>> {
        // No statement leaves the map half changed, so a poisoned lock is safe to use.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task that must complete before the daemon is ready. It completes when this is dropped.
#[derive(Debug)]
#[must_use = "dropping it completes the task"]
pub struct PendingTask {
    readiness: Arc<Readiness>,
    name: String,
}

impl Drop for PendingTask {
    fn drop(&mut self) {
        let mut pending = self.readiness.lock();
        if let Some(count) = pending.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                pending.remove(&self.name);
            }
        }
    }
}

/// Serves the readiness port until stopped: 200 if no task is pending and `is_alive` resolves to
/// true, else 500 with the list of what is pending.
pub(crate) async fn serve<F>(
    listener: TcpListener,
    readiness: Arc<Readiness>,
    is_alive: impl Fn() -> F + 'static,
    stop: CancellationToken,
) where
    F: Future<Output = bool> + 'static,
{
    let is_alive = Rc::new(is_alive);
    admin::serve(listener, stop, move |request| {
        let (readiness, is_alive) = (readiness.clone(), is_alive.clone());
        async move { respond(&request, &readiness, is_alive.as_ref()).await }
    })
    .await;
}

async fn respond<F: Future<Output = bool>>(
    request: &Request,
    readiness: &Readiness,
    is_alive: impl Fn() -> F,
) -> Response {
    match (request.path.as_str(), &request.method) {
        ("/healthz/ready", &Method::GET) => {
            let mut pending = readiness.pending_tasks();
            if !is_alive().await {
                pending.push("data plane".into());
            }
            if pending.is_empty() {
                return text(StatusCode::OK, "ready\n");
            }
            text(
                StatusCode::INTERNAL_SERVER_ERROR,
                format!("not ready, pending: {}\n", pending.join(", ")),
            )
        }
        ("/healthz/ready", _) => method_not_allowed("GET"),
        _ => not_found(),
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    /// Status and body of a request to the readiness endpoint.
    async fn request(method: Method, readiness: &Readiness, is_alive: bool) -> (u16, String) {
        let request = Request {
            method,
            path: "/healthz/ready".into(),
            query: String::new(),
        };
        let response = respond(&request, readiness, || std::future::ready(is_alive)).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn ready_when_no_task_is_pending() {
        let readiness = Readiness::new();
        let first = readiness.register_task("source folder");
        let second = readiness.register_task("pods of this node");
        let (status, body) = request(Method::GET, &readiness, true).await;
        assert_eq!(
            (status, body.as_str()),
            (
                500,
                "not ready, pending: pods of this node, source folder\n"
            )
        );
        drop((first, second));
        assert_eq!(request(Method::GET, &readiness, true).await.0, 200);
    }

    #[tokio::test]
    async fn not_ready_when_a_worker_does_not_reply() {
        let (status, body) = request(Method::GET, &Readiness::default(), false).await;
        assert_eq!(
            (status, body.as_str()),
            (500, "not ready, pending: data plane\n")
        );
    }

    #[tokio::test]
    async fn task_registered_twice_must_complete_twice() {
        let readiness = Readiness::new();
        let first = readiness.register_task("pod");
        let second = readiness.register_task("pod");
        drop(first);
        assert_eq!(readiness.pending_tasks(), ["pod"]);
        drop(second);
        assert!(readiness.pending_tasks().is_empty());
    }

    #[tokio::test]
    async fn other_methods_than_get_are_refused() {
        let (status, _) = request(Method::POST, &Readiness::default(), true).await;
        assert_eq!(status, 405);
    }
}
