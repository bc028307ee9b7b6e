//! The CONNECT's head between `http` types and ours.

use std::fmt::Display;

use http::header::{FORWARDED, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, request};

use crate::connect::{Baggage, ConnectRequest, ConnectResponse, HeaderError};
use crate::reason::Reason;

static BAGGAGE: HeaderName = HeaderName::from_static("baggage");
static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The request that goes out.
pub(super) fn request(connect: &ConnectRequest) -> Result<Request<()>, Reason> {
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

/// The request that came in.
pub(super) fn parse(head: &request::Parts, max_bytes: u32) -> Result<ConnectRequest, HeaderError> {
    let malformed = |header, problem| HeaderError { header, problem };
    if head.method != Method::CONNECT {
        return Err(malformed(":method", "not CONNECT"));
    }
    let size: usize = head
        .headers
        .iter()
        .map(|(k, v)| k.as_str().len() + v.len())
        .sum();
    if size > max_bytes as usize {
        return Err(malformed("headers", "too large"));
    }
    let authority = head
        .uri
        .authority()
        .ok_or(malformed(":authority", "missing"))?;
    Ok(ConnectRequest {
        authority: authority.as_str().parse()?,
        baggage: value(&head.headers, &BAGGAGE).map(Baggage::parse),
        forwarded: value(&head.headers, &FORWARDED).and_then(|v| v.parse().ok()),
        traceparent: value(&head.headers, &TRACEPARENT).and_then(|v| v.parse().ok()),
    })
}

/// The 200 that goes out.
pub(super) fn accepted(connect: &ConnectResponse) -> Response<()> {
    let mut response = Response::new(());
    insert(response.headers_mut(), &BAGGAGE, connect.baggage.as_ref());
    response
}

/// A refusal that goes out; a status that is none becomes 503.
pub(super) fn rejected(status: u16) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(status)
        .ok()
        .filter(|status| !status.is_informational() && !status.is_success())
        .unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    response
}

/// The answer that came in.
pub(super) fn answer<B>(response: &Response<B>) -> Result<ConnectResponse, Reason> {
    match response.status() {
        StatusCode::OK => Ok(ConnectResponse {
            baggage: value(response.headers(), &BAGGAGE).map(Baggage::parse),
        }),
        status => Err(Reason::ConnectRejected(status.as_u16())),
    }
}

/// Our own values are printable ASCII by construction; one that is not is left out, for it is a hint only.
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
    fn a_request_survives_the_wire() {
        let connect = ConnectRequest {
            authority: "10.0.0.1:80".parse().unwrap(),
            baggage: Some(Baggage::parse("service.name=web")),
            forwarded: Some(Forwarded {
                for_: ([10, 0, 0, 2], 4711).into(),
                host: None,
            }),
            traceparent: Some(TraceParent::random()),
        };
        let (head, ()) = request(&connect).unwrap().into_parts();
        assert_eq!(parse(&head, 1024), Ok(connect));
    }

    #[test]
    fn a_malformed_hint_is_dropped_and_a_malformed_authority_is_refused() {
        let connect = ConnectRequest::new("10.0.0.1:80".parse().unwrap());
        let (mut head, ()) = request(&connect).unwrap().into_parts();
        head.headers
            .insert(FORWARDED, HeaderValue::from_static("nonsense"));
        head.headers.insert(
            TRACEPARENT.clone(),
            HeaderValue::from_bytes(b"\xff").unwrap(),
        );
        assert_eq!(parse(&head, 1024), Ok(connect));
        head.uri = "user@10.0.0.1:80".parse().unwrap();
        assert!(parse(&head, 1024).is_err());
    }

    #[test]
    fn headers_that_are_too_large_are_refused() {
        let authority = Authority::Host {
            name: "a".into(),
            port: 1,
        };
        let (mut head, ()) = request(&ConnectRequest::new(authority))
            .unwrap()
            .into_parts();
        head.headers
            .insert("x", HeaderValue::try_from("a".repeat(1024)).unwrap());
        assert_eq!(parse(&head, 1024).unwrap_err().header, "headers");
        assert!(parse(&head, 1025).is_ok());
    }

    #[test]
    fn no_status_of_a_refusal_means_yes() {
        for status in [0, 100, 200, 299, 1000] {
            assert_eq!(rejected(status).status(), StatusCode::SERVICE_UNAVAILABLE);
        }
        assert_eq!(rejected(401).status(), StatusCode::UNAUTHORIZED);
    }
}
