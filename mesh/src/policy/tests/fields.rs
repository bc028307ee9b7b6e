//! Every field of a rule, as ALLOW and as DENY.

use super::*;

/// A rule, connections that it matches and connections that it does not match.
type Case = (
    &'static str,
    &'static [&'static str],
    &'static [&'static str],
);

const FROM: [Case; 29] = [
    // Principals: exact, prefix, suffix, presence.
    (
        "principals: [cluster.local/ns/shop/sa/web]",
        &[WEB],
        &[BANK, PLAIN],
    ),
    (
        "principals: [cluster.local/ns/shop/sa/web, cluster.local/ns/bank/sa/web]",
        &[WEB, BANK],
        &[PLAIN],
    ),
    (
        "principals: [cluster.local/ns/shop/*]",
        &[WEB],
        &[BANK, PLAIN],
    ),
    (
        "principals: ['*/sa/web']",
        &[WEB, BANK],
        &["cluster.local/ns/shop/sa/db 10.0.0.2 8080", PLAIN],
    ),
    (
        "principals: ['*']",
        &[WEB, BANK, "other.org/any 10.9.9.9 1"],
        &[PLAIN],
    ),
    (
        "principals: [cluster.local/ns/shop/sa/we]",
        &[],
        &[WEB, BANK, PLAIN],
    ),
    (
        "notPrincipals: [cluster.local/ns/shop/sa/web]",
        &[BANK, PLAIN],
        &[WEB],
    ),
    ("notPrincipals: ['*']", &[PLAIN], &[WEB, BANK]),
    (
        "notPrincipals: ['*/ns/shop/sa/web']",
        &[BANK, PLAIN],
        &[WEB],
    ),
    // Namespaces.
    ("namespaces: [shop]", &[WEB], &[BANK, PLAIN]),
    ("namespaces: ['sho*']", &[WEB], &[BANK, PLAIN]),
    ("namespaces: ['*nk']", &[BANK], &[WEB, PLAIN]),
    (
        "namespaces: ['*']",
        &[WEB, BANK],
        &[PLAIN, "cluster.local/workload/x 10.9.9.9 1"],
    ),
    ("notNamespaces: [shop]", &[BANK, PLAIN], &[WEB]),
    // Service accounts: of the policy's namespace or another one, in any trust domain.
    (
        "serviceAccounts: [web]",
        &[WEB, "other.org/ns/shop/sa/web 10.9.9.9 1"],
        &[BANK, PLAIN],
    ),
    ("serviceAccounts: [bank/web]", &[BANK], &[WEB, PLAIN]),
    ("notServiceAccounts: [bank/web]", &[WEB, PLAIN], &[BANK]),
    (
        "notServiceAccounts: [web, bank/web]",
        &[PLAIN],
        &[WEB, BANK],
    ),
    // Trust domains.
    (
        "trustDomains: [cluster.local]",
        &[WEB],
        &["other.org/ns/shop/sa/web 10.0.0.1 1", PLAIN],
    ),
    (
        "notTrustDomains: ['*.org']",
        &[WEB, PLAIN],
        &["other.org/ns/shop/sa/web 10.0.0.1 1"],
    ),
    // Addresses.
    ("ipBlocks: [10.0.0.1]", &[WEB], &[BANK, PLAIN]),
    (
        "ipBlocks: [10.0.0.0/31, 'fd00::/8']",
        &[WEB, "- fd01::1 1"],
        &[BANK, "- 2001:db8::1 1"],
    ),
    (
        "ipBlocks: [0.0.0.0/0]",
        &[WEB, BANK, PLAIN],
        &["- fd00::1 1"],
    ),
    ("ipBlocks: [10.0.0.77/24]", &[WEB, BANK], &[PLAIN]),
    (
        "notIpBlocks: [10.0.0.0/8]",
        &[PLAIN, "- fd00::1 1"],
        &[WEB, BANK],
    ),
    (
        "notIpBlocks: ['fd00::1']",
        &[WEB, "- fd00::2 1"],
        &["- fd00::1 1"],
    ),
    // All fields of a source must match.
    (
        "{namespaces: [shop], notPrincipals: ['*/sa/web']}",
        &["cluster.local/ns/shop/sa/db 10.0.0.2 1"],
        &[WEB, BANK, PLAIN],
    ),
    (
        "{principals: ['*'], ipBlocks: [10.0.0.1]}",
        &[WEB],
        &[BANK, "- 10.0.0.1 8080"],
    ),
    (
        "{namespaces: ['*'], notNamespaces: [bank]}",
        &[WEB],
        &[BANK, PLAIN],
    ),
];

const RULES: [Case; 29] = [
    // Operations.
    (
        "to: [{operation: {ports: ['8080']}}]",
        &[WEB, PLAIN],
        &["- 192.0.2.7 80"],
    ),
    (
        "to: [{operation: {ports: ['80', '8080']}}]",
        &[WEB, "- 192.0.2.7 80"],
        &["- 192.0.2.7 81"],
    ),
    (
        "to: [{operation: {notPorts: ['8080']}}]",
        &["- 192.0.2.7 80"],
        &[WEB, PLAIN],
    ),
    (
        "to: [{operation: {ports: ['80']}}, {operation: {ports: ['81']}}]",
        &["- 192.0.2.7 80", "- 192.0.2.7 81"],
        &[WEB],
    ),
    // Sources: one of them.
    (
        "from: [{source: {namespaces: [shop]}}, {source: {ipBlocks: [192.0.2.0/24]}}]",
        &[WEB, PLAIN],
        &[BANK],
    ),
    // from, to and when: all of them.
    (
        "{from: [{source: {namespaces: [shop]}}], to: [{operation: {ports: ['8080']}}]}",
        &[WEB],
        &[BANK, "cluster.local/ns/shop/sa/web 10.0.0.1 80"],
    ),
    (
        "{from: [{source: {principals: ['*']}}], when: [{key: source.namespace, notValues: [bank]}]}",
        &[WEB],
        &[BANK, PLAIN],
    ),
    ("{}", &[WEB, BANK, PLAIN], &[]),
    // Conditions.
    (
        "when: [{key: source.ip, values: [10.0.0.0/30]}]",
        &[WEB, BANK],
        &[PLAIN],
    ),
    (
        "when: [{key: source.ip, notValues: [10.0.0.0/30]}]",
        &[PLAIN],
        &[WEB, BANK],
    ),
    (
        "when: [{key: source.ip, values: [10.0.0.0/30], notValues: [10.0.0.3]}]",
        &[WEB],
        &[BANK, PLAIN],
    ),
    (
        "when: [{key: source.namespace, values: [shop, x]}]",
        &[WEB],
        &[BANK, PLAIN],
    ),
    (
        "when: [{key: source.namespace, notValues: [shop]}]",
        &[BANK, PLAIN],
        &[WEB],
    ),
    (
        "when: [{key: source.principal, values: ['*/ns/shop/sa/web']}]",
        &[WEB],
        &[BANK, PLAIN],
    ),
    (
        "when: [{key: source.principal, notValues: ['*']}]",
        &[PLAIN],
        &[WEB, BANK],
    ),
    (
        "when: [{key: source.serviceAccount, values: [bank/web]}]",
        &[BANK],
        &[WEB, PLAIN],
    ),
    (
        "when: [{key: source.serviceAccount, notValues: [bank/web]}]",
        &[WEB, PLAIN],
        &[BANK],
    ),
    (
        "when: [{key: source.trustDomain, values: [cluster.local]}]",
        &[WEB],
        &["x.org/ns/shop/sa/web 10.0.0.1 1", PLAIN],
    ),
    (
        "when: [{key: source.trustDomain, notValues: [cluster.local]}]",
        &["x.org/ns/shop/sa/web 10.0.0.1 1", PLAIN],
        &[WEB],
    ),
    (
        "when: [{key: destination.ip, values: [10.0.0.2]}]",
        &[WEB, PLAIN],
        &[],
    ),
    (
        "when: [{key: destination.ip, values: [10.0.0.1, 'fd00::/8']}]",
        &[],
        &[WEB, PLAIN],
    ),
    (
        "when: [{key: destination.ip, notValues: [10.0.0.2]}]",
        &[],
        &[WEB, PLAIN],
    ),
    (
        "when: [{key: destination.port, values: ['8080']}]",
        &[WEB, PLAIN],
        &["- 192.0.2.7 80"],
    ),
    (
        "when: [{key: destination.port, notValues: ['8080']}]",
        &["- 192.0.2.7 80"],
        &[WEB, PLAIN],
    ),
    (
        "when: [{key: destination.port, values: ['8080']}, {key: source.namespace, values: [shop]}]",
        &[WEB],
        &[BANK, PLAIN],
    ),
    // The edges of ports.
    (
        "to: [{operation: {ports: ['1', '65535']}}]",
        &["- 192.0.2.7 1", "- 192.0.2.7 65535"],
        &[WEB],
    ),
    // A trust domain is compared in lower case.
    (
        "from: [{source: {principals: [Cluster.Local/ns/shop/sa/web]}}]",
        &[WEB],
        &[BANK],
    ),
    // An identity in another form than Istio's has no namespace and no account.
    (
        "from: [{source: {namespaces: [shop]}}]",
        &[],
        &[
            "cluster.local/ns/shop/sa/a/b 10.0.0.9 1",
            "cluster.local/x/ns/shop/sa/web 10.0.0.9 1",
        ],
    ),
    (
        "from: [{source: {notNamespaces: [shop]}}]",
        &["cluster.local/workload/shop 10.0.0.9 1"],
        &[WEB],
    ),
];

#[test]
fn source_matches_by_each_of_its_fields() {
    for (source, matching, others) in FROM {
        let source = source
            .strip_prefix('{')
            .map_or_else(|| format!("{{{source}}}"), |rest| format!("{{{rest}"));
        check(&format!("from: [{{source: {source}}}]"), matching, others);
    }
}

#[test]
fn rule_matches_by_each_of_its_parts() {
    for (rule, matching, others) in RULES {
        check(rule, matching, others);
    }
}

/// Checks a rule as ALLOW and as DENY.
fn check(rule: &str, matching: &[&str], others: &[&str]) {
    let rule = rule
        .strip_prefix('{')
        .and_then(|r| r.strip_suffix('}'))
        .unwrap_or(rule);
    let spec = |action: &str| format!("{{action: {action}, rules: [{{{rule}}}]}}");
    let allow = fixture(&[authz("shop/p", &spec("ALLOW"))]);
    let deny = fixture(&[authz("shop/p", &spec("DENY"))]);
    for fixture in [&allow, &deny] {
        assert_eq!(
            fixture.report("shop/p").state,
            PolicyState::Accepted,
            "{rule}: {:?}",
            fixture.diagnostics
        );
    }
    let no_allow = Some("AuthorizationPolicy: no ALLOW matched".to_owned());
    let denied = Some("AuthorizationPolicy shop/p".to_owned());
    for connection in matching {
        assert_eq!(
            allow.denial("shop/db", connection),
            None,
            "ALLOW {rule}: {connection}"
        );
        assert_eq!(
            deny.denial("shop/db", connection),
            denied,
            "DENY {rule}: {connection}"
        );
    }
    for connection in others {
        assert_eq!(
            allow.denial("shop/db", connection),
            no_allow,
            "ALLOW {rule}: {connection}"
        );
        assert_eq!(
            deny.denial("shop/db", connection),
            None,
            "DENY {rule}: {connection}"
        );
    }
}

#[test]
fn one_matching_rule_of_several_is_enough() {
    let rules =
        "rules: [{from: [{source: {namespaces: [shop]}}]}, {to: [{operation: {ports: ['9']}}]}]";
    let allow = fixture(&[authz("shop/p", &format!("{{{rules}}}"))]);
    assert!(allow.allows("shop/db", WEB) && allow.allows("shop/db", "- 192.0.2.7 9"));
    assert!(!allow.allows("shop/db", PLAIN));
}

#[test]
fn ipv4_mapped_source_matches_as_ipv4() {
    let fixture = fixture(&[authz(
        "shop/p",
        "rules: [{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}]",
    )]);
    assert!(fixture.allows("shop/db", "- ::ffff:10.0.0.1 1"));
}

#[test]
fn principals_match_under_each_trust_domain_alias() {
    let mut params = params();
    let name = |name: &str| spiffe::TrustDomain::new(name).unwrap();
    params.trust_domain = name("new.org");
    params.trust_domain_aliases = vec![name("old.org")];
    let of = |principal: &str| {
        let spec = format!("rules: [{{from: [{{source: {{principals: ['{principal}']}}}}]}}]");
        fixture_with(&[authz("shop/p", &spec)], &params)
    };
    for written in ["new.org", "old.org", "cluster.local"] {
        let fixture = of(&format!("{written}/ns/shop/sa/web"));
        for named in ["new.org", "old.org"] {
            assert!(fixture.allows("shop/db", &format!("{named}/ns/shop/sa/web 10.0.0.1 1")));
        }
        assert!(!fixture.allows("shop/db", "third.org/ns/shop/sa/web 10.0.0.1 1"));
    }
    let foreign = of("third.org/ns/shop/sa/web");
    assert!(foreign.allows("shop/db", "third.org/ns/shop/sa/web 10.0.0.1 1"));
    assert!(!foreign.allows("shop/db", "new.org/ns/shop/sa/web 10.0.0.1 1"));
}
