//! What is refused, with which code and which reason.

use std::time::Duration;

use tonic::Code;

use super::super::*;
use super::bench::*;

fn signed_by(key: &TokenKey, audience: &str, change: impl FnOnce(&mut Claims)) -> String {
    let account = Account::new("istio-system", "ztunnel").unwrap();
    let minute = Duration::from_secs(60);
    let mut claims = Claims::new(&account, audience, minute, vec!["shop/*".to_owned()]);
    change(&mut claims);
    key.sign(&claims).unwrap()
}

fn foreign_key(bench: &Bench) -> TokenKey {
    let (private, public) = (bench.path("other.key"), bench.path("other.pub"));
    create_keys(&private, &public).unwrap();
    TokenKey::open(&private).unwrap()
}

impl Bench {
    async fn refusal(&self, ask: Ask<'_>) -> (Code, String) {
        let status = self.ask(ask).await.expect_err("it is to be refused");
        let reason = status.message().split(':').next().unwrap_or_default();
        (status.code(), reason.to_owned())
    }
}

#[tokio::test]
async fn whoever_cannot_prove_who_it_is_gets_nothing() {
    let bench = Bench::start().await;
    let good = bench.token();
    let (head, signature) = good.rsplit_once('.').unwrap();
    let other = if signature.starts_with('A') { "B" } else { "A" };
    let flipped = format!("{head}.{other}{}", &signature[1..]);
    let cases = [
        (None, "no_token"),
        (Some("nonsense".to_owned()), "token_malformed"),
        (Some(flipped), "token_signature"),
        (
            Some(signed_by(&foreign_key(&bench), "istio-ca", |_| ())),
            "token_signature",
        ),
        (
            Some(signed_by(&bench.key, "somebody-else", |_| ())),
            "token_audience",
        ),
        (
            // Shown again after its end.
            Some(signed_by(&bench.key, "istio-ca", |claims| {
                claims.exp -= 120;
            })),
            "token_expired",
        ),
        (
            Some(signed_by(&bench.key, "istio-ca", |claims| {
                claims.sub = "system:node:a".to_owned();
            })),
            "token_claims",
        ),
    ];
    for (token, reason) in cases {
        let ask = Ask {
            token: token.as_deref(),
            identity: Some(WEB),
            ..Ask::default()
        };
        let refusal = bench.refusal(ask).await;
        assert_eq!(refusal, (Code::Unauthenticated, reason.to_owned()));
    }
}

#[tokio::test]
async fn a_token_that_holds_now_is_refused_when_it_is_replayed_after_its_end() {
    let bench = Bench::start().await;
    // It has ended already, and is taken for as long as clocks may differ.
    let short = signed_by(&bench.key, "istio-ca", |claims| {
        claims.exp -= 62;
    });
    let ask = || Ask {
        token: Some(&short),
        identity: Some(WEB),
        ..Ask::default()
    };
    bench.ask(ask()).await.unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    let refused = loop {
        match bench.ask(ask()).await {
            Err(status) => break status,
            Ok(_) => assert!(tokio::time::Instant::now() < deadline),
        }
    };
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().starts_with("token_expired"), "{refused}");
}

#[tokio::test]
async fn whoever_asks_for_another_s_identity_is_told_which_one_was_refused() {
    let bench = Bench::start().await;
    let token = bench.token();
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
        let ask = Ask {
            token: Some(&token),
            identity: Some(identity),
            ..Ask::default()
        };
        assert_eq!(
            bench.refusal(ask).await,
            (code, reason.to_owned()),
            "{identity}"
        );
    }
    let ask = Ask {
        token: Some(&token),
        identity: Some("spiffe://cluster.local/ns/bank/sa/web"),
        ..Ask::default()
    };
    let denied = bench.ask(ask).await.unwrap_err();
    assert!(
        denied
            .message()
            .contains("istio-system/ztunnel may not speak for bank/web")
    );
}

#[tokio::test]
async fn a_request_that_cannot_be_certified_is_refused() {
    let bench = Bench::start().await;
    let token = bench.token();
    let garbage = [
        (String::new(), 0, Code::InvalidArgument, "csr_malformed"),
        (
            "garbage".to_owned(),
            0,
            Code::InvalidArgument,
            "csr_malformed",
        ),
        (csr(&pair()), 9, Code::InvalidArgument, "ttl_too_short"),
        (
            "x".repeat(20 * 1024),
            0,
            Code::InvalidArgument,
            "csr_malformed",
        ),
    ];
    for (csr, seconds, code, reason) in garbage {
        let ask = Ask {
            token: Some(&token),
            identity: Some(WEB),
            csr: Some(csr),
            seconds,
        };
        assert_eq!(bench.refusal(ask).await, (code, reason.to_owned()));
    }
    // It is not even read.
    let huge = Ask {
        token: Some(&token),
        csr: Some("x".repeat(1 << 20)),
        ..Ask::default()
    };
    assert_eq!(bench.ask(huge).await.unwrap_err().code(), Code::OutOfRange);
    let counted = "ambit_ca_refused_total{reason=\"request_too_large\"} 1";
    assert!(bench.metrics().await.contains(counted));
}

#[tokio::test]
async fn an_authority_that_has_expired_signs_nothing_and_is_not_ready() {
    let bench = Bench::start().await;
    let (token, channel) = (bench.token(), bench.channel());
    let ask = || Ask {
        token: Some(&token),
        identity: Some(WEB),
        ..Ask::default()
    };
    call(channel.clone(), ask()).await.unwrap();
    bench.pass(11 * 365 * 24 * 3600);
    let refused = call(channel, ask()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().starts_with("ca_expired"), "{refused}");
    let ready = page(bench.running().readiness, "/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
}
