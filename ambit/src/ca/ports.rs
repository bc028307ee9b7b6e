//! The pages for operators: metrics on one port, readiness on another.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// A few scrapers and probes, and a person. More wait in the backlog.
const CONNECTIONS: usize = 64;
/// For the head of a request; also how long an idle connection is kept.
const HEAD: Duration = Duration::from_secs(10);
/// For a whole connection.
const CONNECTION: Duration = Duration::from_secs(600);
const HEAD_BYTES: usize = 16 * 1024;
/// After a failed `accept`.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers for a path: status and text, or that there is no such page.
pub(super) trait Pages:
    Fn(&str) -> Option<(StatusCode, String)> + Clone + Send + 'static
{
}

impl<F> Pages for F where F: Fn(&str) -> Option<(StatusCode, String)> + Clone + Send + 'static {}

/// Serves a port until stopped.
pub(super) async fn serve(listener: TcpListener, stop: CancellationToken, pages: impl Pages) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, pages.clone()));
                }
                Err(_) => sleep(PAUSE).await,
            }
        }
    }
    connections.shutdown().await;
}

async fn connection(stream: TcpStream, pages: impl Pages) {
    let service = service_fn(move |request: Request<Incoming>| {
        let answer = answer(request.method(), request.uri().path(), &pages);
        async { Ok::<_, Infallible>(answer) }
    });
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(HEAD_BYTES);
    let connection = server.serve_connection(TokioIo::new(stream), service);
    // A client that breaks the protocol, or goes away, has lost only its own connection.
    let _ = timeout(CONNECTION, connection).await;
}

fn answer(method: &Method, path: &str, pages: &impl Pages) -> Response<Full<Bytes>> {
    let (status, text) = match *method {
        Method::GET => pages(path).unwrap_or((StatusCode::NOT_FOUND, "not found\n".to_owned())),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "use GET\n".to_owned()),
    };
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let kind = http::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
