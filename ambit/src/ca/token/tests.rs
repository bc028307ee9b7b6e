use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::*;

struct Bench {
    folder: tempfile::TempDir,
    key: TokenKey,
    tokens: SignedTokens,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let (private, public) = (folder.path().join("key"), folder.path().join("pub"));
    create_keys(&private, &public).unwrap();
    Bench {
        key: TokenKey::open(&private).unwrap(),
        tokens: SignedTokens::open(&public, "istio-ca").unwrap(),
        folder,
    }
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap().as_secs()
}

fn claims() -> Value {
    json!({
        "sub": "system:serviceaccount:istio-system:ztunnel", "aud": ["istio-ca"],
        "exp": now() + 600, "impersonate": ["shop/*"],
    })
}

impl Bench {
    fn reason(&self, claims: &Value) -> &'static str {
        let token = self.key.sign(claims).unwrap();
        self.tokens.recognise(Some(&token)).unwrap_err().reason
    }
}

#[test]
fn a_good_token_tells_who_asks_and_for_whom_it_may() {
    let bench = bench();
    let account = Account::new("istio-system", "ztunnel").unwrap();
    let minute = Duration::from_secs(60);
    let claims = Claims::new(&account, "istio-ca", minute, vec!["shop/*".into()]);
    let token = bench.key.sign(&claims).unwrap();
    let caller = bench.tokens.recognise(Some(&token)).unwrap();
    assert_eq!(caller.account, account);
    let web = Account::new("shop", "web").unwrap();
    assert_eq!(caller.speaks_for(Some(web.clone())), Ok(web));
    assert_eq!(caller.speaks_for(None), Ok(account));
    let foreign = caller.speaks_for(Account::new("bank", "web")).unwrap_err();
    assert!(foreign.message.contains("bank/web"), "{foreign:?}");
}

#[test]
fn an_audience_may_be_one_name_or_several() {
    let bench = bench();
    for audience in [json!("istio-ca"), json!(["other", "istio-ca"])] {
        let mut claims = claims();
        claims["aud"] = audience;
        let token = bench.key.sign(&claims).unwrap();
        bench.tokens.recognise(Some(&token)).unwrap();
    }
}

#[test]
fn every_token_that_does_not_hold_is_refused_with_its_reason() {
    let bench = bench();
    let cases = [
        ("exp", json!(now() - 60), "token_expired"),
        ("exp", Value::Null, "token_claims"),
        ("exp", json!("tomorrow"), "token_claims"),
        ("nbf", json!(now() + 60), "token_not_yet_valid"),
        ("aud", json!(["somebody-else"]), "token_audience"),
        ("aud", Value::Null, "token_claims"),
        ("sub", json!("root"), "token_claims"),
        ("sub", Value::Null, "token_claims"),
        ("impersonate", json!(["*"]), "token_claims"),
        ("impersonate", json!("shop/*"), "token_claims"),
    ];
    for (claim, value, reason) in cases {
        let mut claims = claims();
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(claim)),
            value => claims[claim] = value,
        }
        assert_eq!(bench.reason(&claims), reason, "{claims}");
    }
}

#[test]
fn a_token_expires_with_ten_seconds_of_leeway_and_no_more() {
    let bench = bench();
    let mut claims = claims();
    claims["exp"] = json!(now() - 5);
    let token = bench.key.sign(&claims).unwrap();
    bench.tokens.recognise(Some(&token)).unwrap();
    claims["exp"] = json!(now() - 12);
    assert_eq!(bench.reason(&claims), "token_expired");
}

#[test]
fn a_token_of_another_algorithm_or_none_is_refused() {
    let bench = bench();
    let none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJzdWIiOiJ4In0.";
    let symmetric = jsonwebtoken::encode(
        &Header::new(Algorithm::HS256),
        &claims(),
        // The public key taken for a secret: what is forged when the header is believed.
        &EncodingKey::from_secret(&std::fs::read(bench.folder.path().join("pub")).unwrap()),
    )
    .unwrap();
    for token in [none, &symmetric, "", "x", "a.b.c", &"x".repeat(20_000)] {
        let error = bench.tokens.recognise(Some(token)).unwrap_err();
        assert_eq!(error.reason, "token_malformed", "{token}");
    }
    assert_eq!(bench.tokens.recognise(None).unwrap_err().reason, "no_token");
}

#[test]
fn one_key_replaces_another_while_both_are_in_the_file() {
    let (old, new) = (bench(), bench());
    let foreign = new.key.sign(&claims()).unwrap();
    let refused = old.tokens.recognise(Some(&foreign)).unwrap_err();
    assert_eq!(refused.reason, "token_signature");

    let file = |bench: &Bench| bench.folder.path().join("pub");
    let mut both = std::fs::read(file(&old)).unwrap();
    both.extend(std::fs::read(file(&new)).unwrap());
    std::fs::write(file(&old), &both).unwrap();
    old.tokens.look().unwrap();
    old.tokens.recognise(Some(&foreign)).unwrap();
    let own = old.key.sign(&claims()).unwrap();
    old.tokens.recognise(Some(&own)).unwrap();

    std::fs::write(file(&old), std::fs::read(file(&new)).unwrap()).unwrap();
    old.tokens.look().unwrap();
    assert_eq!(
        old.tokens.recognise(Some(&own)).unwrap_err().reason,
        "token_signature"
    );
}

#[test]
fn a_key_file_that_cannot_be_used_leaves_the_keys_in_force() {
    let bench = bench();
    let file = bench.folder.path().join("pub");
    let private = std::fs::read(bench.folder.path().join("key")).unwrap();
    for content in [b"".as_slice(), b"garbage", &private] {
        std::fs::write(&file, content).unwrap();
        assert!(bench.tokens.look().is_err());
        assert!(SignedTokens::open(&file, "istio-ca").is_err());
    }
    let token = bench.key.sign(&claims()).unwrap();
    bench.tokens.recognise(Some(&token)).unwrap();
}

#[test]
fn keys_are_made_for_their_owner_alone_and_never_overwritten() {
    let bench = bench();
    let (private, public) = (
        bench.folder.path().join("key"),
        bench.folder.path().join("pub"),
    );
    let mode = |mode| std::fs::Permissions::from_mode(mode);
    let made = std::fs::metadata(&private).unwrap().permissions().mode();
    assert_eq!(made & 0o777, 0o600);
    assert!(matches!(
        create_keys(&private, &public),
        Err(KeyFileError::File { .. })
    ));
    std::fs::set_permissions(&private, mode(0o640)).unwrap();
    assert!(matches!(
        TokenKey::open(&private),
        Err(KeyFileError::Open { mode: 0o640, .. })
    ));
}
