//! How request and response heads are converted between `http` types and ours.

use std::fmt::Display;

use http::header::{FORWARDED, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, request};

use crate::connect::{Baggage, ConnectRequest, ConnectResponse, HeaderError};
use crate::reason::Reason;

static BAGGAGE: HeaderName = HeaderName::from_static("baggage");
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The `http` request of a CONNECT.
pub(super) fn encode_request(connect: &ConnectRequest) -> Result<Request<()>, Reason> {
    let uri = Uri::builder()
        .authority(connect.authority.to_string())
        .build()
        .map_err(|_| Reason::ConnectMalformed)?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    *request.version_mut() = http::Version::HTTP_2;
    let headers = request.headers_mut();
    insert(headers, &BAGGAGE, connect.baggage.as_ref());
    insert(headers, &FORWARDED, connect.forwarded.as_ref());
    insert(headers, &TRACEPARENT, connect.traceparent.as_ref());
    Ok(request)
}

/// Parses a received CONNECT, whose headers have at most `max_bytes`.
pub(super) fn decode_request(
    head: &request::Parts,
    max_bytes: u32,
) -> Result<ConnectRequest, HeaderError> {
    let error = |header, problem| HeaderError { header, problem };
    if head.method != Method::CONNECT {
        return Err(error(":method", "not CONNECT"));
    }
    let size: usize = head
        .headers
        .iter()
        .map(|(k, v)| k.as_str().len() + v.len())
        .sum();
    if size > max_bytes as usize {
        return Err(error("headers", "too large"));
    }
    let authority = head.uri.authority().ok_or(error(":authority", "missing"))?;
    Ok(ConnectRequest {
        authority: authority.as_str().parse()?,
        baggage: value(&head.headers, &BAGGAGE).map(Baggage::parse),
        forwarded: value(&head.headers, &FORWARDED).and_then(|v| v.parse().ok()),
        traceparent: value(&head.headers, &TRACEPARENT).and_then(|v| v.parse().ok()),
    })
}

/// The `http` response of a 200.
pub(super) fn encode_response(connect: &ConnectResponse) -> Response<()> {
    let mut response = Response::new(());
    insert(response.headers_mut(), &BAGGAGE, connect.baggage.as_ref());
    response
}

/// The `http` response of a rejection. A status that is informational, a success or invalid becomes 503.
pub(super) fn rejection(status: u16) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(status)
        .ok()
        .filter(|status| !status.is_informational() && !status.is_success())
        .unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    response
}

/// Parses a received response. Any status but 200 is an error.
pub(super) fn decode_response<B>(response: &Response<B>) -> Result<ConnectResponse, Reason> {
    match response.status() {
        StatusCode::OK => Ok(ConnectResponse {
            baggage: value(response.headers(), &BAGGAGE).map(Baggage::parse),
        }),
        status => Err(Reason::ConnectRejected(status.as_u16())),
    }
}

/// Adds a header, if its value is not empty. Our values are printable ASCII by construction; any other value is omitted,
/// because these headers are hints only.
fn insert(headers: &mut HeaderMap, name: &HeaderName, value: Option<&impl Display>) {
    let value = value
        .map(ToString::to_string)
        .filter(|value| !value.is_empty());
    if let Some(value) = value.and_then(|value| HeaderValue::try_from(value).ok()) {
        headers.insert(name.clone(), value);
    }
}

fn value<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::{Authority, Forwarded, TraceParent};

    #[test]
    fn request_round_trips() {
        let connect = ConnectRequest {
            authority: "10.0.0.1:80".parse().unwrap(),
            baggage: Some(Baggage::parse("service.name=web")),
            forwarded: Some(Forwarded {
                for_: ([10, 0, 0, 2], 4711).into(),
                host: None,
            }),
            traceparent: Some(TraceParent::random()),
        };
        let (head, ()) = encode_request(&connect).unwrap().into_parts();
        assert_eq!(decode_request(&head, 1024), Ok(connect));
    }

    #[test]
    fn malformed_hint_is_dropped_and_malformed_authority_is_rejected() {
        let connect = ConnectRequest::new("10.0.0.1:80".parse().unwrap());
        let (mut head, ()) = encode_request(&connect).unwrap().into_parts();
        head.headers
            .insert(FORWARDED, HeaderValue::from_static("nonsense"));
        head.headers.insert(
            TRACEPARENT.clone(),
            HeaderValue::from_bytes(b"\xff").unwrap(),
        );
        assert_eq!(decode_request(&head, 1024), Ok(connect));
        head.uri = "user@10.0.0.1:80".parse().unwrap();
        assert!(decode_request(&head, 1024).is_err());
    }

    #[test]
    fn oversized_headers_are_rejected() {
        let authority = Authority::Host {
            name: "a".into(),
            port: 1,
        };
        let (mut head, ()) = encode_request(&ConnectRequest::new(authority))
            .unwrap()
            .into_parts();
        head.headers
            .insert("x", HeaderValue::try_from("a".repeat(1024)).unwrap());
        assert_eq!(decode_request(&head, 1024).unwrap_err().header, "headers");
        assert!(decode_request(&head, 1025).is_ok());
    }

    #[test]
    fn rejection_never_has_a_success_status() {
        for status in [0, 100, 200, 299, 1000] {
            assert_eq!(rejection(status).status(), StatusCode::SERVICE_UNAVAILABLE);
        }
        assert_eq!(rejection(401).status(), StatusCode::UNAUTHORIZED);
    }
}
