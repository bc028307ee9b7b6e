//! The HTTP/1.1 server behind admin, metrics and readiness ports. Every wait, size and count is
//! bounded, and every connection ends with [`serve`].
//!
//! hyper serves the connections. A web framework (axum) would add a router and tower's service
//! stack for six fixed paths, and none of the bounds below.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use http::{HeaderValue, Method, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Connections that one port serves at a time: a few scrapers and probes, and a person. Others wait
/// in the listen backlog.
const MAX_CONNECTIONS: usize = 64;

/// Until the head of a request has arrived; also the longest idle time of a connection.
const HEAD_READ_TIMEOUT: Duration = Duration::from_secs(10);

/// After this a connection takes no further request. A scraper that keeps its connection opens
/// another one.
const MAX_CONNECTION_AGE: Duration = Duration::from_secs(30);

/// For the response that is being written at [`MAX_CONNECTION_AGE`]. A client that does not read
/// then frees its place.
const LAST_RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

const MAX_HEADERS: usize = 64;
const MAX_HEAD_BYTES: usize = 16 * 1024;

/// Pause after a failed `accept`, so that a process out of file descriptors does not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// A response, with its body in memory.
pub type Response = http::Response<Full<Bytes>>;

/// A request without its body, which no endpoint reads.
#[derive(Clone, Debug)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The path, as sent.
    pub path: String,
    /// The query without `?`, as sent; empty if there is none.
    pub query: String,
}

impl Request {
    /// The first value of a query parameter, percent-decoded. Malformed escapes stay as they are.
    pub fn query_param(&self, name: &str) -> Option<String> {
        form_urlencoded::parse(self.query.as_bytes())
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.into_owned())
    }
}

impl From<http::Request<Incoming>> for Request {
    fn from(request: http::Request<Incoming>) -> Self {
        Self {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            query: request.uri().query().unwrap_or_default().to_owned(),
        }
    }
}

/// Serves a port until `stop` is cancelled; open connections end with it.
///
/// All connections run inside the returned future. It is `Send` if the handler and its futures are,
/// and runs on a `LocalSet` if not. A panic of the handler ends only that connection.
pub async fn serve<H, F>(listener: std::net::TcpListener, stop: CancellationToken, handler: H)
where
    H: Fn(Request) -> F,
    F: Future<Output = Response>,
{
    let listener = match listener
        .set_nonblocking(true)
        .and_then(|()| tokio::net::TcpListener::from_std(listener))
    {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "cannot serve an admin port"),
    };
    let mut connections = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            Some(_) = connections.next() => {}
            stream = accept(&listener), if connections.len() < MAX_CONNECTIONS => {
                let connection = serve_connection(stream, &handler);
                connections.push(AssertUnwindSafe(connection).catch_unwind());
            }
        }
    }
}

/// Accepts the next connection. Open connections continue during the pause after a failure.
async fn accept(listener: &tokio::net::TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(_) => sleep(ACCEPT_BACKOFF).await,
        }
    }
}

async fn serve_connection<H, F>(stream: TcpStream, handler: &H)
where
    H: Fn(Request) -> F,
    F: Future<Output = Response>,
{
    let service = service_fn(|request: http::Request<Incoming>| {
        handler(request.into()).map(Ok::<_, std::convert::Infallible>)
    });
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_READ_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES);
    // A client that violates the protocol or disconnects affects its own connection only.
    let mut connection = pin!(server.serve_connection(TokioIo::new(stream), service));
    if timeout(MAX_CONNECTION_AGE, connection.as_mut())
        .await
        .is_err()
    {
        connection.as_mut().graceful_shutdown();
        let _ = timeout(LAST_RESPONSE_TIMEOUT, connection).await;
    }
}

/// A response of plain text.
pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Response {
    response(status, "text/plain; charset=utf-8", body)
}

/// A response of any content type.
pub fn response(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Metrics in the text format of Prometheus.
pub fn metrics(body: impl Into<Bytes>) -> Response {
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    response(StatusCode::OK, content_type, body)
}

/// The response for an unknown path.
pub fn not_found() -> Response {
    text(StatusCode::NOT_FOUND, "not found\n")
}

/// The response for a known path with another method.
pub fn method_not_allowed(allowed: &'static str) -> Response {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, format!("use {allowed}\n"));
    response
        .headers_mut()
        .insert(header::ALLOW, HeaderValue::from_static(allowed));
    response
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::time::Instant;

    use super::*;

    #[test]
    fn query_parameters_are_decoded_and_malformed_escapes_kept() {
        let param = |query: &str, name: &str| {
            let request = Request {
                method: Method::GET,
                path: "/".into(),
                query: query.into(),
            };
            request.query_param(name)
        };
        assert_eq!(
            param("level=info%2Caccess%3doff&x=1", "level").as_deref(),
            Some("info,access=off")
        );
        assert_eq!(param("level=%zz%4", "level").as_deref(), Some("%zz%4"));
        assert_eq!(param("level=%é", "level").as_deref(), Some("%é"));
        assert_eq!(param("reset", "reset").as_deref(), Some(""));
        assert_eq!(param("other=1", "level"), None);
    }

    fn bind() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    async fn send(address: SocketAddr, path: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut response = String::new();
        let mut stream = send(address, path).await;
        stream.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test(start_paused = true)]
    async fn clients_that_do_not_read_free_their_places_for_others() {
        let big = Bytes::from(vec![b'x'; 64 << 20]);
        let (listener, address) = bind();
        let stop = CancellationToken::new();
        let handler = |request: Request| {
            let body = match request.path.as_str() {
                "/big" => big.clone(),
                _ => Bytes::from("small"),
            };
            async move { text(StatusCode::OK, body) }
        };
        let clients = async {
            let mut stalled = Vec::new();
            for _ in 0..MAX_CONNECTIONS {
                stalled.push(send(address, "/big").await);
            }
            let start = Instant::now();
            let response = get(address, "/").await;
            assert!(response.ends_with("small"), "{response}");
            assert!(start.elapsed() <= MAX_CONNECTION_AGE + LAST_RESPONSE_TIMEOUT + ACCEPT_BACKOFF);
            stop.cancel();
        };
        tokio::join!(serve(listener, stop.clone(), handler), clients);
    }

    #[tokio::test]
    async fn panic_in_the_handler_ends_only_its_connection() {
        let (listener, address) = bind();
        let stop = CancellationToken::new();
        let handler = async |request: Request| {
            assert_ne!(request.path, "/panic");
            text(StatusCode::OK, "served")
        };
        let clients = async {
            assert_eq!(get(address, "/panic").await, "");
            assert!(get(address, "/").await.ends_with("served"));
            stop.cancel();
        };
        tokio::join!(serve(listener, stop.clone(), handler), clients);
    }
}
