//! `istio.io/dry-run`: denials are reported, never enforced.

use super::*;

fn dry_run(doc: Doc) -> Doc {
    doc.annotation("istio.io/dry-run", "true")
}

fn dry_run_denial(fixture: &Fixture, connection: &str) -> Option<String> {
    let decision = fixture.decide("shop/db", connection);
    assert_eq!(decision.denial, None, "{connection}");
    decision.dry_run.map(|denial| denial.to_string())
}

#[test]
fn dry_run_deny_is_reported_and_not_enforced() {
    let deny = authz(
        "shop/p",
        "{action: DENY, rules: [{from: [{source: {namespaces: [bank]}}]}]}",
    );
    let fixture = fixture(&[dry_run(deny)]);
    assert_eq!(
        dry_run_denial(&fixture, BANK).as_deref(),
        Some("AuthorizationPolicy shop/p")
    );
    assert_eq!(dry_run_denial(&fixture, WEB), None);
    assert!(fixture.report("shop/p").dry_run);
}

#[test]
fn dry_run_allows_report_what_none_of_them_matches() {
    let shop = dry_run(authz(
        "shop/a",
        "rules: [{from: [{source: {namespaces: [shop]}}]}]",
    ));
    let bank = dry_run(authz(
        "shop/b",
        "rules: [{from: [{source: {namespaces: [bank]}}]}]",
    ));
    let one = fixture(std::slice::from_ref(&shop));
    assert_eq!(
        dry_run_denial(&one, BANK).as_deref(),
        Some("AuthorizationPolicy: no ALLOW matched")
    );
    assert_eq!(dry_run_denial(&one, WEB), None);
    let two = fixture(&[shop.clone(), bank]);
    assert_eq!(
        (dry_run_denial(&two, BANK), dry_run_denial(&two, WEB)),
        (None, None)
    );
    // An enforced ALLOW policy still allows the connection.
    let forced = authz("shop/c", "rules: [{from: [{source: {principals: ['*']}}]}]");
    assert_eq!(dry_run_denial(&fixture(&[shop, forced]), BANK), None);
}

#[test]
fn denied_connection_has_no_dry_run_denial() {
    let deny = authz("shop/p", "{action: DENY, rules: [{}]}");
    let fixture = fixture(&[
        dry_run(authz("shop/o", "{action: DENY, rules: [{}]}")),
        deny,
    ]);
    let decision = fixture.decide("shop/db", WEB);
    assert_eq!(
        decision.denial.unwrap().to_string(),
        "AuthorizationPolicy shop/p"
    );
    assert_eq!(decision.dry_run, None);
}

#[test]
fn dry_run_annotation_is_parsed_as_in_istio() {
    let deny = || authz("shop/p", "{action: DENY, rules: [{}]}");
    for yes in ["true", "True", "TRUE", "t", "T", "1"] {
        assert!(
            fixture(&[deny().annotation("istio.io/dry-run", yes)]).allows("shop/db", WEB),
            "{yes}"
        );
    }
    for no in ["false", "0", "", "yes", "tRUE"] {
        let fixture = fixture(&[deny().annotation("istio.io/dry-run", no)]);
        assert!(!fixture.allows("shop/db", WEB), "{no}");
        assert_eq!(fixture.report("shop/p").state, PolicyState::Accepted);
        let messages = fixture.messages("shop/p").len();
        assert_eq!(messages, usize::from(matches!(no, "yes" | "tRUE")), "{no}");
    }
}
