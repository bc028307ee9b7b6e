//! The client against a test CA.

mod test_ca;

use std::time::Instant;

use rustls_pki_types::CertificateDer;
use tonic::Code;

use super::*;
use test_ca::{Reply, TestCa, WEB, leaf, web};

const TTL: Duration = Duration::from_secs(60);

/// Encodes a certificate as PEM (base64 of RFC 4648, section 4).
pub(super) fn pem(certificate: &CertificateDer<'_>) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    for chunk in certificate.chunks(3) {
        let bytes = [0, 1, 2].map(|at| u32::from(chunk.get(at).copied().unwrap_or(0)));
        let bits = bytes[0] << 16 | bytes[1] << 8 | bytes[2];
        for at in 0..4 {
            let sextet = (bits >> (18 - 6 * at) & 63) as usize;
            let letter = ALPHABET[sextet] as char;
            text.push(if at <= chunk.len() { letter } else { '=' });
        }
    }
    text.push_str("\n-----END CERTIFICATE-----\n");
    text
}

async fn outcome(reply: Reply) -> Result<IssuedCertificate, IssueError> {
    let ca = TestCa::start(reply).await;
    ca.client().issue(&web(), TTL).await
}

async fn rejection(reply: Reply) -> (&'static str, String) {
    let error = outcome(reply).await.expect_err("a rejection");
    (error.code, error.message)
}

#[tokio::test]
async fn a_valid_response_returns_the_certificate_and_adds_the_roots() {
    let ca = TestCa::start(Reply::Sign).await;
    let client = ca.client();
    let issued = client.issue(&web(), TTL).await.unwrap();
    assert_eq!(issued.chain.len(), 1);
    assert_eq!(client.bundle().borrow().roots(), [ca.root()]);
    let requests = ca.requests();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].identity, WEB);
    assert_eq!(requests[0].seconds, 60);
    assert_eq!(requests[0].authorization, "Bearer first");
    assert_eq!(requests[0].cluster, "Kubernetes");
}

#[tokio::test]
async fn the_token_is_read_for_every_call() {
    let ca = TestCa::start(Reply::Sign).await;
    let client = ca.client();
    client.issue(&web(), TTL).await.unwrap();
    ca.write_token("second\n");
    client.issue(&web(), TTL).await.unwrap();
    let tokens: Vec<String> = ca.requests().into_iter().map(|a| a.authorization).collect();
    assert_eq!(tokens, ["Bearer first", "Bearer second"]);
    for (token, expected) in [("", "is empty"), ("two\nlines", "cannot be sent")] {
        ca.write_token(token);
        let error = client.issue(&web(), TTL).await.unwrap_err();
        assert_eq!(error.code, IssueError::DENIED);
        assert!(error.message.contains(expected), "{error}");
        assert!(!error.message.contains("lines"), "{error}");
    }
    assert_eq!(ca.requests().len(), 2);
}

#[tokio::test]
async fn errors_of_the_ca_are_reported_on_one_line_with_a_reason_code() {
    for (code, expected) in [
        (Code::Unauthenticated, IssueError::DENIED),
        (Code::PermissionDenied, IssueError::DENIED),
        (Code::InvalidArgument, IssueError::DENIED),
        (Code::Unavailable, IssueError::UNREACHABLE),
        (Code::DeadlineExceeded, IssueError::TIMEOUT),
        (Code::Internal, "ca_failed"),
        (Code::Unimplemented, "ca_failed"),
    ] {
        let text = format!("no\n\x1b[31m way{}", "!".repeat(1000));
        let (reason, message) = rejection(Reply::Status(code, text)).await;
        assert_eq!(reason, expected, "{code:?}");
        assert!(message.contains("no  [31m way"), "{message}");
        assert!(message.len() < 500, "{message}");
    }
}

#[tokio::test]
async fn an_unparsable_response_is_malformed() {
    let empty = || vec![String::new()];
    for chain in [
        vec![],
        empty(),
        vec!["not PEM".to_owned()],
        vec!["-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----".to_owned()],
    ] {
        let (reason, _) = rejection(Reply::Chain(chain)).await;
        assert_eq!(reason, "issued_garbage");
    }
    // Over the size limit: rejected before it is parsed.
    let huge = Reply::Chain(vec!["x".repeat(MAX_RESPONSE_BYTES)]);
    assert_eq!(rejection(huge).await.0, "issued_garbage");
}

#[tokio::test]
async fn a_response_with_too_many_certificates_is_rejected_before_parsing() {
    let one = pem(&CertificateDer::from(vec![0x30, 0x00]));
    let (reason, _) = rejection(Reply::Chain(vec![one; 81])).await;
    assert_eq!(reason, "chain_too_long");
}

#[tokio::test]
async fn an_invalid_root_is_rejected_and_the_previous_roots_stay() {
    let ca = TestCa::start(Reply::Sign).await;
    let client = ca.client();
    client.issue(&web(), TTL).await.unwrap();
    let leaf = leaf(&ca);
    ca.set_reply(Reply::Chain(vec![leaf.clone(), leaf]));
    let error = client.issue(&web(), TTL).await.unwrap_err();
    assert_eq!(error.code, "issued_garbage");
    assert_eq!(client.bundle().borrow().roots(), [ca.root()]);
}

#[tokio::test]
async fn a_rejected_response_adds_no_root() {
    let ca = TestCa::start(Reply::Sign).await;
    let client = ca.client();
    let other = test_ca::root();
    for (first, code) in [(leaf(&ca), "key_mismatch"), (pem(&other), "issued_garbage")] {
        ca.set_reply(Reply::Chain(vec![first, pem(&other)]));
        let error = client.issue(&web(), TTL).await.unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert_eq!(client.bundle().borrow().roots(), [ca.root()]);
    }
    let another = "spiffe://cluster.local/ns/shop/sa/other";
    for (by, named, code) in [
        (ca.authority(), another, "wrong_identity"),
        (test_ca::authority(), WEB, "chain_untrusted"),
    ] {
        let (identity, roots) = (named.parse().unwrap(), vec![other.clone()]);
        ca.set_reply(Reply::SignAs {
            by,
            identity,
            roots,
        });
        let error = client.issue(&web(), TTL).await.unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert_eq!(client.bundle().borrow().roots(), [ca.root()]);
    }
    // A valid response adds the same root.
    ca.set_reply(Reply::SignAs {
        by: ca.authority(),
        identity: web(),
        roots: vec![other.clone()],
    });
    client.issue(&web(), TTL).await.unwrap();
    assert!(client.bundle().borrow().roots().contains(&other));
}

#[tokio::test]
async fn several_roots_are_parsed_from_one_element_or_from_several() {
    let (one, two) = (test_ca::root(), test_ca::root());
    let ca = TestCa::start(Reply::Sign).await;
    let (leaf, own) = (leaf(&ca), pem(&ca.root()));
    let together = vec![leaf.clone(), format!("{}{}{own}", pem(&one), pem(&two))];
    let apart = vec![leaf, pem(&one), pem(&two), own];
    for chain in [together, apart] {
        let parsed = response::parse(&chain).unwrap();
        assert_eq!(parsed.chain.len(), 1);
        assert_eq!(parsed.roots.len(), 3);
        for root in [one.clone(), two.clone(), ca.root()] {
            assert!(parsed.roots.contains(&root));
        }
    }
}

#[tokio::test]
async fn a_ca_that_hangs_or_disconnects_fails_within_the_deadline() {
    for reply in [Reply::Hang, Reply::Disconnect] {
        let ca = TestCa::start(reply).await;
        let client = ca.client_with_short_timeout();
        let start = Instant::now();
        let error = client.issue(&web(), TTL).await.unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(7));
        let codes = [IssueError::TIMEOUT, IssueError::UNREACHABLE];
        assert!(codes.contains(&error.code), "{error}");
        // The next request uses a new connection.
        ca.set_reply(Reply::Sign);
        client.issue(&web(), TTL).await.unwrap();
    }
}

#[tokio::test]
async fn a_stopped_ca_is_unreachable_until_it_restarts() {
    let mut ca = TestCa::start(Reply::Sign).await;
    let client = ca.client();
    client.issue(&web(), TTL).await.unwrap();
    ca.stop().await;
    let error = client.issue(&web(), TTL).await.unwrap_err();
    assert_eq!(error.code, IssueError::UNREACHABLE);
    ca.restart().await;
    client.issue(&web(), TTL).await.unwrap();
}

#[tokio::test]
async fn a_ca_with_an_untrusted_certificate_gets_no_request() {
    let ca = TestCa::start(Reply::Sign).await;
    ca.write_roots(&[test_ca::root()]);
    let error = ca.client().issue(&web(), TTL).await.unwrap_err();
    assert_eq!(error.code, IssueError::UNREACHABLE);
    assert!(
        error.message.contains("invalid peer certificate"),
        "{error}"
    );

    ca.write_roots(&[ca.root()]);
    let mut config = ca.config();
    config.server_name = Some("other.example".to_owned());
    let other = IstioCa::new(config.clone()).unwrap();
    let error = other.issue(&web(), TTL).await.unwrap_err();
    assert!(error.message.contains("other.example"), "{error}");
    assert_eq!(ca.requests().len(), 0);

    // A name of its certificate, which is not that of the address.
    config.server_name = Some("ca.example".to_owned());
    let named = IstioCa::new(config).unwrap();
    named.issue(&web(), TTL).await.unwrap();
}

#[tokio::test]
async fn a_new_root_in_the_file_is_used_for_the_next_connection() {
    let mut ca = TestCa::start(Reply::Sign).await;
    let client = ca.client();
    client.issue(&web(), TTL).await.unwrap();
    ca.stop().await;
    ca.replace_authority();
    ca.restart().await;
    let error = client.issue(&web(), TTL).await.unwrap_err();
    assert_eq!(error.code, IssueError::UNREACHABLE);
    ca.write_roots(&[ca.root()]);
    client.issue(&web(), TTL).await.unwrap();
}

#[test]
fn invalid_configurations_are_rejected() {
    let config = |address: &str| IstioCaConfig::new(address, "/root", "/token");
    assert!(IstioCa::new(config("ca.example:15012")).is_ok());
    assert!(IstioCa::new(config("http://ca.example:15012")).is_err());
    let named = |name: &str| IstioCaConfig {
        server_name: Some(name.to_owned()),
        ..config("ca.example:15012")
    };
    assert!(IstioCa::new(named("10.0.0.1")).is_ok());
    assert!(IstioCa::new(named("not a name")).is_err());
    let cluster = IstioCaConfig {
        cluster_id: "a\nb".to_owned(),
        ..config("ca.example:15012")
    };
    assert!(IstioCa::new(cluster.clone()).is_err());
    // All errors are reported together.
    let wrong = IstioCaConfig {
        address: "nowhere".to_owned(),
        server_name: Some("not a name".to_owned()),
        ..cluster
    };
    assert_eq!(wrong.validation_errors().len(), 3);
    assert!(config("10.0.0.1:15012").validation_errors().is_empty());
}
