//! Readiness: what the daemon still waits for, answered by a data-plane thread, so that an answer
//! proves that traffic flows.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use component::admin::{self, Request, Response, method_not_allowed, not_found, text};
use http::{Method, StatusCode};
use tokio_util::sync::CancellationToken;

/// What has to happen before the daemon is ready. Clones of the `Arc` share it.
#[derive(Debug, Default)]
pub struct Readiness {
    pending: Mutex<BTreeMap<String, usize>>,
}

impl Readiness {
    /// Nothing is pending.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Names something that has to happen first. It has happened when the answer is dropped.
    pub fn pending(self: &Arc<Self>, what: impl Into<String>) -> Pending {
        let what = what.into();
        *self.lock().entry(what.clone()).or_default() += 1;
        Pending {
            readiness: self.clone(),
            what,
        }
    }

    /// What is pending now, sorted.
    pub fn list(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, usize>> {
        // The map is whole between any two statements, so a panic elsewhere has not broken it.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Something that has to happen before the daemon is ready; it has happened when this is dropped.
#[derive(Debug)]
#[must_use = "dropping it says that it has happened"]
pub struct Pending {
    readiness: Arc<Readiness>,
    what: String,
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut pending = self.readiness.lock();
        if let Some(times) = pending.get_mut(&self.what) {
            *times -= 1;
            if *times == 0 {
                pending.remove(&self.what);
            }
        }
    }
}

/// Serves the readiness port until stopped: 200 when nothing is pending and every worker is alive,
/// 500 and the list otherwise.
pub(crate) async fn serve<F>(
    listener: TcpListener,
    readiness: Arc<Readiness>,
    alive: impl Fn() -> F + 'static,
    stop: CancellationToken,
) where
    F: Future<Output = bool> + 'static,
{
    let alive = Rc::new(alive);
    admin::serve(listener, stop, move |request| {
        let (readiness, alive) = (readiness.clone(), alive.clone());
        async move { respond(&request, &readiness, alive.as_ref()).await }
    })
    .await;
}

async fn respond<F: Future<Output = bool>>(
    request: &Request,
    readiness: &Readiness,
    alive: impl Fn() -> F,
) -> Response {
    match (request.path.as_str(), &request.method) {
        ("/healthz/ready", &Method::GET) => {
            let mut pending = readiness.list();
            if !alive().await {
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

    async fn ask(method: Method, readiness: &Readiness, alive: bool) -> (u16, String) {
        let request = Request {
            method,
            path: "/healthz/ready".into(),
            query: String::new(),
        };
        let response = respond(&request, readiness, || std::future::ready(alive)).await;
        let status = response.status().as_u16();
        (
            status,
            String::from_utf8(
                response
                    .into_body()
                    .collect()
                    .await
                    .unwrap()
                    .to_bytes()
                    .to_vec(),
            )
            .unwrap(),
        )
    }

    #[tokio::test]
    async fn it_is_ready_when_nothing_is_pending_any_more() {
        let readiness = Readiness::new();
        let first = readiness.pending("source folder");
        let second = readiness.pending("pods of this node");
        let (status, body) = ask(Method::GET, &readiness, true).await;
        assert_eq!(
            (status, body.as_str()),
            (
                500,
                "not ready, pending: pods of this node, source folder\n"
            )
        );
        drop((first, second));
        assert_eq!(ask(Method::GET, &readiness, true).await.0, 200);
    }

    #[tokio::test]
    async fn a_data_plane_that_does_not_answer_is_not_ready() {
        let (status, body) = ask(Method::GET, &Readiness::default(), false).await;
        assert_eq!(
            (status, body.as_str()),
            (500, "not ready, pending: data plane\n")
        );
    }

    #[tokio::test]
    async fn one_thing_that_is_pending_twice_has_to_happen_twice() {
        let readiness = Readiness::new();
        let first = readiness.pending("pod");
        let second = readiness.pending("pod");
        drop(first);
        assert_eq!(readiness.list(), ["pod"]);
        drop(second);
        assert!(readiness.list().is_empty());
    }

    #[tokio::test]
    async fn readiness_can_be_asked_and_not_posted() {
        assert_eq!(ask(Method::POST, &Readiness::default(), true).await.0, 405);
    }
}
