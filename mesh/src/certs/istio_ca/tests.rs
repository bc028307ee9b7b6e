//! The client against authorities that do as they please.

mod authority;

use std::time::Instant;

use rustls_pki_types::CertificateDer;
use tonic::{Code, Status};

use super::*;
use authority::{Answering, Hostile, WEB, leaf, web};

const TTL: Duration = Duration::from_secs(60);

/// A certificate as PEM; base64 by the alphabet of RFC 4648, section 4.
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

async fn outcome(answering: Answering) -> Result<IssuedCertificate, IssueError> {
    let hostile = Hostile::start(answering).await;
    hostile.client().issue(&web(), TTL).await
}

async fn refused(answering: Answering) -> (&'static str, String) {
    let error = outcome(answering).await.expect_err("it is to be refused");
    (error.code, error.message)
}

#[tokio::test]
async fn a_good_answer_brings_a_certificate_for_the_own_key_and_the_roots() {
    let hostile = Hostile::start(Answering::Well).await;
    let client = hostile.client();
    let issued = client.issue(&web(), TTL).await.unwrap();
    assert_eq!(issued.chain.len(), 1);
    assert_eq!(client.bundle().borrow().roots(), [hostile.root()]);
    let asked = hostile.asked();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].identity, WEB);
    assert_eq!(asked[0].seconds, 60);
    assert_eq!(asked[0].authorization, "Bearer first");
    assert_eq!(asked[0].cluster, "Kubernetes");
}

#[tokio::test]
async fn the_token_is_read_again_for_every_call() {
    let hostile = Hostile::start(Answering::Well).await;
    let client = hostile.client();
    client.issue(&web(), TTL).await.unwrap();
    hostile.write_token("second\n");
    client.issue(&web(), TTL).await.unwrap();
    let tokens: Vec<String> = hostile
        .asked()
        .into_iter()
        .map(|a| a.authorization)
        .collect();
    assert_eq!(tokens, ["Bearer first", "Bearer second"]);
    for (token, said) in [("", "is empty"), ("two\nlines", "cannot be sent")] {
        hostile.write_token(token);
        let error = client.issue(&web(), TTL).await.unwrap_err();
        assert_eq!(error.code, IssueError::DENIED);
        assert!(error.message.contains(said), "{error}");
        assert!(!error.message.contains("lines"), "{error}");
    }
    assert_eq!(hostile.asked().len(), 2);
}

#[tokio::test]
async fn what_an_authority_refuses_is_told_with_its_own_words_in_one_line() {
    for (code, expected) in [
        (Code::Unauthenticated, IssueError::DENIED),
        (Code::PermissionDenied, IssueError::DENIED),
        (Code::InvalidArgument, IssueError::DENIED),
        (Code::Unavailable, IssueError::UNREACHABLE),
        (Code::DeadlineExceeded, IssueError::TIMEOUT),
        (Code::Internal, "ca_failed"),
        (Code::Unimplemented, "ca_failed"),
    ] {
        let said = format!("no\n\x1b[31m way{}", "!".repeat(1000));
        let (reason, message) = refused(Answering::Refusing(code, said)).await;
        assert_eq!(reason, expected, "{code:?}");
        assert!(message.contains("no  [31m way"), "{message}");
        assert!(message.len() < 500, "{message}");
    }
}

#[tokio::test]
async fn an_answer_that_is_no_answer_is_garbage() {
    let empty = || vec![String::new()];
    for chain in [
        vec![],
        empty(),
        vec!["garbage".to_owned()],
        vec!["-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----".to_owned()],
    ] {
        let (reason, _) = refused(Answering::Saying(chain)).await;
        assert_eq!(reason, "issued_garbage");
    }
    // More than any chain: it is not even read to its end.
    let huge = Answering::Saying(vec!["x".repeat(ANSWER_MOST)]);
    assert_eq!(refused(huge).await.0, "issued_garbage");
}

#[tokio::test]
async fn an_answer_with_too_many_certificates_is_refused_before_any_is_looked_at() {
    let one = pem(&CertificateDer::from(vec![0x30, 0x00]));
    let (reason, _) = refused(Answering::Saying(vec![one; 81])).await;
    assert_eq!(reason, "chain_too_long");
}

#[tokio::test]
async fn a_root_that_is_none_is_garbage_and_leaves_the_good_ones() {
    let hostile = Hostile::start(Answering::Well).await;
    let client = hostile.client();
    client.issue(&web(), TTL).await.unwrap();
    let leaf = leaf(&hostile);
    hostile.answer(Answering::Saying(vec![leaf.clone(), leaf]));
    let error = client.issue(&web(), TTL).await.unwrap_err();
    assert_eq!(error.code, "issued_garbage");
    assert_eq!(client.bundle().borrow().roots(), [hostile.root()]);
}

#[tokio::test]
async fn an_answer_that_is_refused_teaches_no_root() {
    let hostile = Hostile::start(Answering::Well).await;
    let client = hostile.client();
    let other = authority::root();
    for (first, code) in [
        (leaf(&hostile), "key_mismatch"),
        (pem(&other), "issued_garbage"),
    ] {
        hostile.answer(Answering::Saying(vec![first, pem(&other)]));
        let error = client.issue(&web(), TTL).await.unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert_eq!(client.bundle().borrow().roots(), [hostile.root()]);
    }
    let another = "spiffe://cluster.local/ns/shop/sa/other";
    for (by, named, code) in [
        (hostile.authority(), another, "wrong_identity"),
        (authority::authority(), WEB, "chain_untrusted"),
    ] {
        let (identity, roots) = (named.parse().unwrap(), vec![other.clone()]);
        hostile.answer(Answering::Signing {
            by,
            identity,
            roots,
        });
        let error = client.issue(&web(), TTL).await.unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert_eq!(client.bundle().borrow().roots(), [hostile.root()]);
    }
    // The same answer, had it been a good one.
    hostile.answer(Answering::Signing {
        by: hostile.authority(),
        identity: web(),
        roots: vec![other.clone()],
    });
    client.issue(&web(), TTL).await.unwrap();
    assert!(client.bundle().borrow().roots().contains(&other));
}

#[tokio::test]
async fn several_roots_are_found_in_the_last_element_or_in_elements_of_their_own() {
    let (one, two) = (authority::root(), authority::root());
    let hostile = Hostile::start(Answering::Well).await;
    let (leaf, own) = (leaf(&hostile), pem(&hostile.root()));
    let together = vec![leaf.clone(), format!("{}{}{own}", pem(&one), pem(&two))];
    let apart = vec![leaf, pem(&one), pem(&two), own];
    for chain in [together, apart] {
        let read = answer::read(&chain).unwrap();
        assert_eq!(read.chain.len(), 1);
        assert_eq!(read.roots.len(), 3);
        for root in [one.clone(), two.clone(), hostile.root()] {
            assert!(read.roots.contains(&root));
        }
    }
}

#[tokio::test]
async fn an_authority_that_never_answers_costs_the_deadline_and_no_more() {
    for answering in [Answering::Never, Answering::Closing] {
        let hostile = Hostile::start(answering).await;
        let client = hostile.impatient_client();
        let began = Instant::now();
        let error = client.issue(&web(), TTL).await.unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(7));
        let codes = [IssueError::TIMEOUT, IssueError::UNREACHABLE];
        assert!(codes.contains(&error.code), "{error}");
        // And it is asked again on another connection.
        hostile.answer(Answering::Well);
        client.issue(&web(), TTL).await.unwrap();
    }
}

#[tokio::test]
async fn an_authority_that_is_gone_is_unreachable_until_it_is_back() {
    let mut hostile = Hostile::start(Answering::Well).await;
    let client = hostile.client();
    client.issue(&web(), TTL).await.unwrap();
    hostile.stop().await;
    let error = client.issue(&web(), TTL).await.unwrap_err();
    assert_eq!(error.code, IssueError::UNREACHABLE);
    hostile.start_again().await;
    client.issue(&web(), TTL).await.unwrap();
}

#[tokio::test]
async fn an_authority_that_cannot_prove_itself_is_not_asked() {
    let hostile = Hostile::start(Answering::Well).await;
    hostile.write_roots(&[authority::root()]);
    let error = hostile.client().issue(&web(), TTL).await.unwrap_err();
    assert_eq!(error.code, IssueError::UNREACHABLE);
    assert!(
        error.message.contains("invalid peer certificate"),
        "{error}"
    );

    hostile.write_roots(&[hostile.root()]);
    let mut config = hostile.config();
    config.server_name = Some("other.example".to_owned());
    let other = IstioCa::new(config.clone()).unwrap();
    let error = other.issue(&web(), TTL).await.unwrap_err();
    assert!(error.message.contains("other.example"), "{error}");
    assert_eq!(hostile.asked().len(), 0);

    // The name that it has, whatever the address is.
    config.server_name = Some("ca.example".to_owned());
    let named = IstioCa::new(config).unwrap();
    named.issue(&web(), TTL).await.unwrap();
}

#[tokio::test]
async fn an_authority_whose_root_was_replaced_is_asked_when_the_file_is() {
    let mut hostile = Hostile::start(Answering::Well).await;
    let client = hostile.client();
    client.issue(&web(), TTL).await.unwrap();
    hostile.stop().await;
    hostile.become_another();
    hostile.start_again().await;
    let error = client.issue(&web(), TTL).await.unwrap_err();
    assert_eq!(error.code, IssueError::UNREACHABLE);
    hostile.write_roots(&[hostile.root()]);
    client.issue(&web(), TTL).await.unwrap();
}

#[test]
fn what_cannot_be_asked_is_said_at_once() {
    let config = |address: &str| IstioCaConfig::new(address, "/root", "/token");
    assert!(IstioCa::new(config("ca.example:15012")).is_ok());
    assert!(IstioCa::new(config("http://ca.example:15012")).is_err());
    let named = |name: &str| IstioCaConfig {
        server_name: Some(name.to_owned()),
        ..config("ca.example:15012")
    };
    assert!(IstioCa::new(named("10.0.0.1")).is_ok());
    assert!(IstioCa::new(named("no name")).is_err());
    let cluster = IstioCaConfig {
        cluster_id: "a\nb".to_owned(),
        ..config("ca.example:15012")
    };
    assert!(IstioCa::new(cluster.clone()).is_err());
    // And all of it together.
    let wrong = IstioCaConfig {
        address: "nowhere".to_owned(),
        server_name: Some("no name".to_owned()),
        ..cluster
    };
    assert_eq!(wrong.validation_errors().len(), 3);
    assert!(config("10.0.0.1:15012").validation_errors().is_empty());
}

#[test]
fn no_lost_call_is_taken_for_a_refusal() {
    assert!(lost(&Status::unavailable("")));
    assert!(lost(&Status::unknown("")));
    assert!(!lost(&Status::permission_denied("")));
}
