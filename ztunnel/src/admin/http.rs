//! The small HTTP/1.1 server behind the three ports: every wait and every size bounded, every
//! connection owned.

use std::convert::Infallible;
use std::future::Future;
use std::net::TcpListener;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Connections that one port serves at a time: a few scrapers and probes, and a person. More wait
/// in the backlog.
const CONNECTIONS: usize = 64;

/// For the head of a request; also how long an idle connection is kept.
const HEAD: Duration = Duration::from_secs(10);

/// After which a connection takes no further request. A scraper that keeps its connection simply
/// makes another.
const CONNECTION: Duration = Duration::from_secs(30);

/// For the answer that is under way then. Whoever does not read gives its place to others.
const LAST_ANSWER: Duration = Duration::from_secs(10);

/// Headers of one request, and bytes of its head.
const HEADERS: usize = 64;
const HEAD_BYTES: usize = 16 * 1024;

/// After a failed `accept`, so that a process out of descriptors does not spin.
const PAUSE: Duration = Duration::from_millis(100);

/// An answer, and the only body type there is.
pub(super) type Answer = Response<Full<Bytes>>;

/// A request without its body, which no endpoint reads.
pub(super) struct Asked {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) query: String,
}

impl Asked {
    /// The first value of a query parameter, percent-decoded.
    pub(super) fn parameter(&self, name: &str) -> Option<String> {
        self.query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then(|| decoded(value))
        })
    }
}

/// `%xx` and `+` replaced; what is malformed stays as it is.
fn decoded(value: &str) -> String {
    let bytes = value.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let hex = (byte == b'%')
            .then(|| {
                value
                    .get(at + 1..at + 3)
                    .and_then(|hex| u8::from_str_radix(hex, 16).ok())
            })
            .flatten();
        out.push(match (byte, hex) {
            (_, Some(escaped)) => {
                at += 2;
                escaped
            }
            (b'+', None) => b' ',
            (other, None) => other,
        });
        at += 1;
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Serves a port until stopped. Runs in a `LocalSet`.
pub(super) async fn serve<F, S>(listener: TcpListener, stop: CancellationToken, answer: S)
where
    F: Future<Output = Answer> + 'static,
    S: Fn(Asked) -> F + 'static,
{
    let listener = match listener
        .set_nonblocking(true)
        .and_then(|()| tokio::net::TcpListener::from_std(listener))
    {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "an admin port cannot be served"),
    };
    let answer = Rc::new(answer);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn_local(connection(stream, answer.clone()));
                }
                Err(_) => sleep(PAUSE).await,
            }
        }
    }
    connections.shutdown().await;
}

async fn connection<F, S>(stream: TcpStream, answer: Rc<S>)
where
    F: Future<Output = Answer> + 'static,
    S: Fn(Asked) -> F + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let asked = Asked {
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            query: request.uri().query().unwrap_or_default().to_owned(),
        };
        let answer = answer(asked);
        async { Ok::<_, Infallible>(answer.await) }
    });
    let mut server = http1::Builder::new();
    server
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_headers(HEADERS)
        .max_buf_size(HEAD_BYTES);
    // A client that breaks the protocol, or goes away, has lost only its own connection.
    let mut serving = pin!(server.serve_connection(TokioIo::new(stream), service));
    if timeout(CONNECTION, serving.as_mut()).await.is_err() {
        serving.as_mut().graceful_shutdown();
        let _ = timeout(LAST_ANSWER, serving).await;
    }
}

/// An answer in text.
pub(super) fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    answer(status, "text/plain; charset=utf-8", body)
}

/// An answer of any type.
pub(super) fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// There is no such page.
pub(super) fn not_found() -> Answer {
    text(StatusCode::NOT_FOUND, "not found\n")
}

/// The page exists, but not for this method.
pub(super) fn method_not_allowed(allowed: &'static str) -> Answer {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, format!("use {allowed}\n"));
    response
        .headers_mut()
        .insert(header::ALLOW, HeaderValue::from_static(allowed));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn a_parameter_is_decoded_and_what_is_malformed_is_left_alone() {
        let asked = |query: &str| Asked {
            method: Method::GET,
            path: "/".into(),
            query: query.into(),
        };
        assert_eq!(
            asked("level=info%2Caccess%3doff&x=1")
                .parameter("level")
                .as_deref(),
            Some("info,access=off")
        );
        assert_eq!(
            asked("level=%zz%4").parameter("level").as_deref(),
            Some("%zz%4")
        );
        assert_eq!(asked("level=%é").parameter("level").as_deref(), Some("%é"));
        assert_eq!(asked("reset").parameter("reset").as_deref(), Some(""));
        assert_eq!(asked("other=1").parameter("level"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_loses_its_place_and_others_are_served() {
        let big = Bytes::from(vec![b'x'; 64 << 20]);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let answer = move |asked: Asked| {
            let body = if asked.path == "/big" {
                big.clone()
            } else {
                Bytes::from("small")
            };
            async move { text(StatusCode::OK, body) }
        };
        let asks = async |path: &str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            stream
        };
        let local = tokio::task::LocalSet::new();
        let serving = local.spawn_local(serve(listener, stop.clone(), answer));
        local
            .run_until(async {
                let mut deaf = Vec::new();
                for _ in 0..CONNECTIONS {
                    deaf.push(asks("/big").await);
                }
                let begun = tokio::time::Instant::now();
                let mut answer = String::new();
                asks("/").await.read_to_string(&mut answer).await.unwrap();
                assert!(answer.ends_with("small"), "{answer}");
                assert!(begun.elapsed() <= CONNECTION + LAST_ANSWER + PAUSE);
                stop.cancel();
                serving.await.unwrap();
            })
            .await;
    }
}
