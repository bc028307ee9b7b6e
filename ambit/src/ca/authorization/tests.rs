use super::super::service_account::ServiceAccountPatterns;
use super::*;

const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

fn metadata(kind: Kind) -> Option<Struct> {
    let value = prost_types::Value { kind: Some(kind) };
    Some(Struct {
        fields: [(IMPERSONATED_IDENTITY.to_owned(), value)].into(),
    })
}

fn named(identity: &str) -> Option<Struct> {
    metadata(Kind::StringValue(identity.to_owned()))
}

/// The identity that `istio-system/ztunnel` gets, or the reason of the refusal.
fn identity_for(
    metadata: Option<&Struct>,
    may_impersonate: &[&str],
) -> Result<String, &'static str> {
    let caller = Caller {
        account: ServiceAccount::new("istio-system", "ztunnel").unwrap(),
        may_impersonate: ServiceAccountPatterns::parse(may_impersonate).unwrap(),
    };
    let domain = TrustDomain::new("cluster.local").unwrap();
    identity(metadata, &caller, &domain)
        .map(|identity| identity.to_string())
        .map_err(|refusal| refusal.reason)
}

#[test]
fn request_without_an_identity_gets_the_callers_own() {
    let own = Ok("spiffe://cluster.local/ns/istio-system/sa/ztunnel".to_owned());
    assert_eq!(identity_for(None, &[]), own);
    assert_eq!(identity_for(Some(&Struct::default()), &[]), own);
    assert_eq!(identity_for(named("").as_ref(), &[]), own);
    let null = metadata(Kind::NullValue(0));
    assert_eq!(identity_for(null.as_ref(), &[]), own);
}

#[test]
fn identity_is_granted_only_if_the_caller_may_impersonate_it() {
    let web = named(WEB);
    let identity_for = |patterns: &[&str]| identity_for(web.as_ref(), patterns);
    assert_eq!(identity_for(&["shop/web"]), Ok(WEB.into()));
    assert_eq!(identity_for(&["*/*"]), Ok(WEB.into()));
    assert_eq!(identity_for(&[]), Err("not_allowed"));
    assert_eq!(identity_for(&["bank/*"]), Err("not_allowed"));
}

#[test]
fn foreign_and_malformed_identities_are_refused_for_every_caller() {
    let all = ["*/*"];
    let foreign = named("spiffe://other.example/ns/shop/sa/web");
    assert_eq!(
        identity_for(foreign.as_ref(), &all),
        Err("foreign_trust_domain")
    );
    for malformed in [
        "web",
        "https://cluster.local/ns/shop/sa/web",
        "spiffe://cluster.local/ns/shop/sa/",
        "spiffe://cluster.local/ns/shop/sa/web/",
        "spiffe://cluster.local/ns/shop/sa/web?x=y",
        "spiffe://cluster.local/ns/../sa/web",
        "spiffe://cluster.local/ns/%2e/sa/web",
        "spiffe://cluster.local/ns/*/sa/*",
        "spiffe://cluster.local/waypoint",
        "spiffe://cluster.local",
    ] {
        let outcome = identity_for(named(malformed).as_ref(), &all);
        assert_eq!(outcome, Err("identity_malformed"), "{malformed}");
    }
    let number = metadata(Kind::NumberValue(1.0));
    assert_eq!(
        identity_for(number.as_ref(), &all),
        Err("identity_malformed")
    );
}

#[test]
fn ttl_is_defaulted_cut_at_the_maximum_and_refused_below_the_minimum() {
    let limits = TtlLimits {
        min: Duration::from_secs(10),
        default: Duration::from_secs(100),
        max: Duration::from_secs(1000),
    };
    let seconds = |requested| {
        ttl(requested, &limits)
            .map(|ttl| ttl.as_secs())
            .map_err(|refusal| refusal.reason)
    };
    for (requested, granted) in [
        (0, 100),
        (-1, 100),
        (i64::MIN, 100),
        (10, 10),
        (1000, 1000),
        (1001, 1000),
        (i64::MAX, 1000),
    ] {
        assert_eq!(seconds(requested), Ok(granted), "{requested}");
    }
    assert_eq!(seconds(9), Err("ttl_too_short"));
}
