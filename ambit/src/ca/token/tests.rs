use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::*;

struct Fixture {
    folder: tempfile::TempDir,
    signer: TokenSigner,
    authenticator: TokenAuthenticator,
}

fn fixture() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let (private, public) = (folder.path().join("key"), folder.path().join("pub"));
    create_keys(&private, &public).unwrap();
    Fixture {
        signer: TokenSigner::open(&private).unwrap(),
        authenticator: TokenAuthenticator::open(&public, "istio-ca").unwrap(),
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

impl Fixture {
    fn refusal_reason(&self, claims: &Value) -> &'static str {
        let token = self.signer.sign(claims).unwrap();
        self.authenticator.verify(Some(&token)).unwrap_err().reason
    }
}

#[test]
fn valid_token_identifies_the_caller_and_its_patterns() {
    let fixture = fixture();
    let account = ServiceAccount::new("istio-system", "ztunnel").unwrap();
    let minute = Duration::from_secs(60);
    let claims = Claims::new(&account, "istio-ca", minute, vec!["shop/*".into()]);
    let token = fixture.signer.sign(&claims).unwrap();
    let caller = fixture.authenticator.verify(Some(&token)).unwrap();
    assert_eq!(caller.account, account);
    let may_impersonate = |namespace: &str| {
        let account = ServiceAccount::new(namespace, "web").unwrap();
        caller.may_impersonate.matches(&account)
    };
    assert!(may_impersonate("shop"));
    assert!(!may_impersonate("bank"));
}

#[test]
fn audience_is_a_string_or_a_list() {
    let fixture = fixture();
    for audience in [json!("istio-ca"), json!(["other", "istio-ca"])] {
        let mut claims = claims();
        claims["aud"] = audience;
        let token = fixture.signer.sign(&claims).unwrap();
        fixture.authenticator.verify(Some(&token)).unwrap();
    }
}

#[test]
fn invalid_claims_are_refused_with_their_reason() {
    let fixture = fixture();
    let cases = [
        ("exp", json!(now() - 60), "token_expired"),
        ("exp", Value::Null, "token_claims"),
        ("exp", json!("tomorrow"), "token_claims"),
        ("nbf", json!(now() + 60), "token_not_yet_valid"),
        ("aud", json!(["another-audience"]), "token_audience"),
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
        assert_eq!(fixture.refusal_reason(&claims), reason, "{claims}");
    }
}

#[test]
fn expiry_has_ten_seconds_of_leeway() {
    let fixture = fixture();
    let mut claims = claims();
    claims["exp"] = json!(now() - 5);
    let token = fixture.signer.sign(&claims).unwrap();
    fixture.authenticator.verify(Some(&token)).unwrap();
    claims["exp"] = json!(now() - 12);
    assert_eq!(fixture.refusal_reason(&claims), "token_expired");
}

#[test]
fn tokens_with_other_algorithms_are_refused() {
    let fixture = fixture();
    let none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJzdWIiOiJ4In0.";
    let symmetric = jsonwebtoken::encode(
        &Header::new(Algorithm::HS256),
        &claims(),
        // The public key as HMAC secret: accepted by verifiers that trust the header.
        &EncodingKey::from_secret(&std::fs::read(fixture.folder.path().join("pub")).unwrap()),
    )
    .unwrap();
    for token in [none, &symmetric, "", "x", "a.b.c", &"x".repeat(20_000)] {
        let error = fixture.authenticator.verify(Some(token)).unwrap_err();
        assert_eq!(error.reason, "token_malformed", "{token}");
    }
    assert_eq!(
        fixture.authenticator.verify(None).unwrap_err().reason,
        "no_token"
    );
}

#[test]
fn tokens_of_every_key_in_the_file_are_accepted() {
    let (old, new) = (fixture(), fixture());
    let foreign = new.signer.sign(&claims()).unwrap();
    let refusal = old.authenticator.verify(Some(&foreign)).unwrap_err();
    assert_eq!(refusal.reason, "token_signature");

    let file = |fixture: &Fixture| fixture.folder.path().join("pub");
    let mut both = std::fs::read(file(&old)).unwrap();
    both.extend(std::fs::read(file(&new)).unwrap());
    std::fs::write(file(&old), &both).unwrap();
    old.authenticator.reload().unwrap();
    old.authenticator.verify(Some(&foreign)).unwrap();
    let own = old.signer.sign(&claims()).unwrap();
    old.authenticator.verify(Some(&own)).unwrap();

    std::fs::write(file(&old), std::fs::read(file(&new)).unwrap()).unwrap();
    old.authenticator.reload().unwrap();
    assert_eq!(
        old.authenticator.verify(Some(&own)).unwrap_err().reason,
        "token_signature"
    );
}

#[test]
fn unusable_key_file_keeps_the_previous_keys() {
    let fixture = fixture();
    let file = fixture.folder.path().join("pub");
    let private = std::fs::read(fixture.folder.path().join("key")).unwrap();
    for content in [b"".as_slice(), b"garbage", &private] {
        std::fs::write(&file, content).unwrap();
        assert!(fixture.authenticator.reload().is_err());
        assert!(TokenAuthenticator::open(&file, "istio-ca").is_err());
    }
    let token = fixture.signer.sign(&claims()).unwrap();
    fixture.authenticator.verify(Some(&token)).unwrap();
}

#[test]
fn created_keys_are_private_and_never_overwritten() {
    let fixture = fixture();
    let (private, public) = (
        fixture.folder.path().join("key"),
        fixture.folder.path().join("pub"),
    );
    let mode = |mode| std::fs::Permissions::from_mode(mode);
    let created_mode = std::fs::metadata(&private).unwrap().permissions().mode();
    assert_eq!(created_mode & 0o777, 0o600);
    assert!(matches!(
        create_keys(&private, &public),
        Err(KeyFileError::Io { .. })
    ));
    std::fs::set_permissions(&private, mode(0o640)).unwrap();
    assert!(matches!(
        TokenSigner::open(&private),
        Err(KeyFileError::Permissions { mode: 0o640, .. })
    ));
}
