//! Which requests are refused, with which code and reason?

use std::time::Duration;

use tonic::Code;

use super::super::*;
use super::fixture::*;

fn signed_by(signer: &TokenSigner, audience: &str, change: impl FnOnce(&mut Claims)) -> String {
    let account = ServiceAccount::new("istio-system", "ztunnel").unwrap();
    let minute = Duration::from_secs(60);
    let mut claims = Claims::new(&account, audience, minute, vec!["shop/*".to_owned()]);
    change(&mut claims);
    signer.sign(&claims).unwrap()
}

fn foreign_signer(fixture: &Fixture) -> TokenSigner {
    let (private, public) = (fixture.path("other.key"), fixture.path("other.pub"));
    create_keys(&private, &public).unwrap();
    TokenSigner::open(&private).unwrap()
}

impl Fixture {
    async fn refusal(&self, call: Call<'_>) -> (Code, String) {
        let status = self
            .call(call)
            .await
            .expect_err("the request must be refused");
        let reason = status.message().split(':').next().unwrap_or_default();
        (status.code(), reason.to_owned())
    }
}

#[tokio::test]
async fn unauthenticated_callers_are_refused() {
    let fixture = Fixture::start().await;
    let valid = fixture.token();
    let (head, signature) = valid.rsplit_once('.').unwrap();
    let other = if signature.starts_with('A') { "B" } else { "A" };
    let flipped = format!("{head}.{other}{}", &signature[1..]);
    let cases = [
        (None, "no_token"),
        (Some("nonsense".to_owned()), "token_malformed"),
        (Some(flipped), "token_signature"),
        (
            Some(signed_by(&foreign_signer(&fixture), "istio-ca", |_| ())),
            "token_signature",
        ),
        (
            Some(signed_by(&fixture.signer, "another-audience", |_| ())),
            "token_audience",
        ),
        (
            Some(signed_by(&fixture.signer, "istio-ca", |claims| {
                claims.exp -= 120;
            })),
            "token_expired",
        ),
        (
            Some(signed_by(&fixture.signer, "istio-ca", |claims| {
                claims.sub = "system:node:a".to_owned();
            })),
            "token_claims",
        ),
    ];
    for (token, reason) in cases {
        let call = Call {
            token: token.as_deref(),
            identity: Some(WEB),
            ..Call::default()
        };
        let refusal = fixture.refusal(call).await;
        assert_eq!(refusal, (Code::Unauthenticated, reason.to_owned()));
    }
}

#[tokio::test]
async fn replayed_token_is_refused_after_its_expiry() {
    let fixture = Fixture::start().await;
    // It has expired already, and is accepted for the rest of the leeway.
    let expiring = signed_by(&fixture.signer, "istio-ca", |claims| {
        claims.exp -= 62;
    });
    let call = || Call {
        token: Some(&expiring),
        identity: Some(WEB),
        ..Call::default()
    };
    fixture.call(call()).await.unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    let refused = loop {
        match fixture.call(call()).await {
            Err(status) => break status,
            Ok(_) => assert!(tokio::time::Instant::now() < deadline),
        }
    };
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().starts_with("token_expired"), "{refused}");
}

#[tokio::test]
async fn identities_that_the_caller_may_not_impersonate_are_refused_by_name() {
    let fixture = Fixture::start().await;
    let token = fixture.token();
    let cases = [
        (
            "spiffe://cluster.local/ns/bank/sa/web",
            Code::PermissionDenied,
            "not_allowed",
        ),
        (
            "spiffe://cluster.local/ns/istio-system/sa/istiod",
            Code::PermissionDenied,
            "not_allowed",
        ),
        (
            "spiffe://other.example/ns/shop/sa/web",
            Code::PermissionDenied,
            "foreign_trust_domain",
        ),
        ("shop/web", Code::InvalidArgument, "identity_malformed"),
        (
            "spiffe://cluster.local/ns/shop/sa/web/admin",
            Code::InvalidArgument,
            "identity_malformed",
        ),
        (
            "spiffe://cluster.local/ns/shop/sa/..",
            Code::InvalidArgument,
            "identity_malformed",
        ),
    ];
    for (identity, code, reason) in cases {
        let call = Call {
            token: Some(&token),
            identity: Some(identity),
            ..Call::default()
        };
        assert_eq!(
            fixture.refusal(call).await,
            (code, reason.to_owned()),
            "{identity}"
        );
    }
    let call = Call {
        token: Some(&token),
        identity: Some("spiffe://cluster.local/ns/bank/sa/web"),
        ..Call::default()
    };
    let denied = fixture.call(call).await.unwrap_err();
    assert!(
        denied
            .message()
            .contains("istio-system/ztunnel may not impersonate bank/web")
    );
}

#[tokio::test]
async fn invalid_requests_are_refused() {
    let fixture = Fixture::start().await;
    let token = fixture.token();
    let invalid = [
        (String::new(), 0, Code::InvalidArgument, "csr_malformed"),
        (
            "garbage".to_owned(),
            0,
            Code::InvalidArgument,
            "csr_malformed",
        ),
        (csr(&key_pair()), 9, Code::InvalidArgument, "ttl_too_short"),
        (
            "x".repeat(20 * 1024),
            0,
            Code::InvalidArgument,
            "csr_malformed",
        ),
    ];
    for (csr, seconds, code, reason) in invalid {
        let call = Call {
            token: Some(&token),
            identity: Some(WEB),
            csr: Some(csr),
            seconds,
        };
        assert_eq!(fixture.refusal(call).await, (code, reason.to_owned()));
    }
    // Larger requests are not read.
    let huge = Call {
        token: Some(&token),
        csr: Some("x".repeat(1 << 20)),
        ..Call::default()
    };
    assert_eq!(
        fixture.call(huge).await.unwrap_err().code(),
        Code::OutOfRange
    );
    let counter = "ambit_ca_refused_total{reason=\"request_too_large\"} 1";
    assert!(fixture.metrics().await.contains(counter));
}

#[tokio::test]
async fn expired_authority_issues_nothing_and_is_not_ready() {
    let fixture = Fixture::start().await;
    let (token, channel) = (fixture.token(), fixture.channel());
    let call = || Call {
        token: Some(&token),
        identity: Some(WEB),
        ..Call::default()
    };
    create_certificate(channel.clone(), call()).await.unwrap();
    fixture.advance_clock(11 * 365 * 24 * 3600);
    let refused = create_certificate(channel, call()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().starts_with("ca_expired"), "{refused}");
    let ready = page(fixture.running().readiness, "/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
}
