//! `istio.io/dry-run`: counted, never enforced.

use super::*;

fn on_trial(doc: Doc) -> Doc {
    doc.annotation("istio.io/dry-run", "true")
}

fn trial(world: &World, ask: &str) -> Option<String> {
    let decision = world.decide("shop/db", ask);
    assert_eq!(decision.denial, None, "{ask}");
    decision.dry_run.map(|denial| denial.to_string())
}

#[test]
fn a_deny_on_trial_is_named_and_lets_through() {
    let deny = authz(
        "shop/p",
        "{action: DENY, rules: [{from: [{source: {namespaces: [bank]}}]}]}",
    );
    let world = world(&[on_trial(deny)]);
    assert_eq!(
        trial(&world, BANK).as_deref(),
        Some("AuthorizationPolicy shop/p")
    );
    assert_eq!(trial(&world, WEB), None);
    assert!(world.report("shop/p").dry_run);
}

#[test]
fn allows_on_trial_deny_what_none_of_them_matches() {
    let shop = on_trial(authz(
        "shop/a",
        "rules: [{from: [{source: {namespaces: [shop]}}]}]",
    ));
    let bank = on_trial(authz(
        "shop/b",
        "rules: [{from: [{source: {namespaces: [bank]}}]}]",
    ));
    let one = world(std::slice::from_ref(&shop));
    assert_eq!(
        trial(&one, BANK).as_deref(),
        Some("AuthorizationPolicy: no ALLOW matched")
    );
    assert_eq!(trial(&one, WEB), None);
    let two = world(&[shop.clone(), bank]);
    assert_eq!((trial(&two, BANK), trial(&two, WEB)), (None, None));
    // What an ALLOW in force lets in would still be let in.
    let forced = authz("shop/c", "rules: [{from: [{source: {principals: ['*']}}]}]");
    assert_eq!(trial(&world(&[shop, forced]), BANK), None);
}

#[test]
fn what_is_denied_anyway_is_not_said_to_be_on_trial() {
    let deny = authz("shop/p", "{action: DENY, rules: [{}]}");
    let world = world(&[
        on_trial(authz("shop/o", "{action: DENY, rules: [{}]}")),
        deny,
    ]);
    let decision = world.decide("shop/db", WEB);
    assert_eq!(
        decision.denial.unwrap().to_string(),
        "AuthorizationPolicy shop/p"
    );
    assert_eq!(decision.dry_run, None);
}

#[test]
fn the_annotation_is_read_as_istio_reads_it() {
    let deny = || authz("shop/p", "{action: DENY, rules: [{}]}");
    for yes in ["true", "True", "TRUE", "t", "T", "1"] {
        assert!(
            world(&[deny().annotation("istio.io/dry-run", yes)]).allows("shop/db", WEB),
            "{yes}"
        );
    }
    for no in ["false", "0", "", "yes", "tRUE"] {
        let world = world(&[deny().annotation("istio.io/dry-run", no)]);
        assert!(!world.allows("shop/db", WEB), "{no}");
        assert_eq!(world.report("shop/p").state, PolicyState::Accepted);
        let told = world.messages("shop/p").len();
        assert_eq!(told, usize::from(matches!(no, "yes" | "tRUE")), "{no}");
    }
}
