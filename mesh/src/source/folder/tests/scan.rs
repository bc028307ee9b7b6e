//! Scans of a folder: which changes count, and which objects stay in use.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Arc;

use super::*;
use crate::source::folder::scan::{Debounce, Files, STABLE_FOR, ScanResult};
use crate::testing::{namespace, service};
use crate::{InboundConnection, PolicyState};

/// A folder that the test scans, with a clock that the test moves.
struct Folder {
    dir: TempDir,
    files: Files,
    now: SystemTime,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            files: Files::new(dir.path().to_owned()),
            dir,
            now: SystemTime::now(),
        }
    }

    fn write(&self, file: &str, content: &str) {
        fs::write(self.dir.path().join(file), content).unwrap();
    }

    /// Scans until the changes are settled; whether there were any.
    fn scan(&mut self) -> bool {
        loop {
            match self.scan_once() {
                ScanResult::Unsettled => self.now += STABLE_FOR,
                result => return result == ScanResult::Changed,
            }
        }
    }

    fn scan_once(&mut self) -> ScanResult {
        self.files.scan(&params(), self.now, Debounce::Required)
    }

    /// Moves the clock behind every deadline of the scan.
    fn wait(&mut self) {
        self.now += Duration::from_secs(10);
    }

    /// The names of the workloads, and the codes of the diagnostics.
    fn state(&mut self) -> (Vec<String>, Vec<&'static str>) {
        self.scan();
        let (model, diagnostics) = compile(&self.files.objects(), &params());
        let mut names: Vec<_> = model.workloads().map(|w| w.name.to_string()).collect();
        names.sort();
        (names, diagnostics.iter().map(|p| p.code).collect())
    }
}

fn both() -> [Doc; 2] {
    [pod("web", "10.0.0.1"), pod("db", "10.0.0.2")]
}

#[test]
fn unchanged_content_is_no_change() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &text(&both()));
    assert!(folder.scan());
    assert!(
        !folder.scan(),
        "the same content is no change, even with a recent time stamp"
    );
    folder.wait();
    assert!(!folder.scan());
    fs::remove_file(folder.dir.path().join("a.yaml")).unwrap();
    assert!(folder.scan());
}

#[test]
fn hidden_and_other_files_are_ignored() {
    let mut folder = Folder::new();
    for file in [".a.yaml", "a.yaml.swp", "a.yaml~", "README.md", "#a.yaml#"] {
        folder.write(file, &text(&both()));
    }
    assert!(folder.state().0.is_empty());
}

#[test]
fn kubernetes_volume_of_links_is_read() {
    let mut folder = Folder::new();
    let dir = folder.dir.path().to_owned();
    fs::create_dir(dir.join("..2026")).unwrap();
    fs::write(dir.join("..2026/a.yaml"), text(&both())).unwrap();
    symlink("..2026", dir.join("..data")).unwrap();
    symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
    symlink(".", dir.join("cycle")).unwrap();
    let (names, _) = folder.state();
    assert_eq!(names, ["db", "web"], "a cycle of links adds no object");
}

#[test]
fn unreadable_version_keeps_the_last_good_one() {
    let good = text(&both());
    let cases = [
        (
            "syntax",
            good.replace(
                "\"kind\":\"Pod\",\"metadata\":{\"labels\":{\"app\":\"web\"",
                "[[[",
            ),
        ),
        (
            "type",
            text(&[
                pod("web", "10.0.0.1").set("spec.containers", "none"),
                both()[1].clone(),
            ]),
        ),
        (
            "bad value",
            text(&[pod("web", "10.0.0.300"), both()[1].clone()]),
        ),
        (
            "name",
            text(&[
                pod("web", "10.0.0.1").set("spec.serviceAccountName", "a/b"),
                both()[1].clone(),
            ]),
        ),
        (
            "no name",
            text(&[
                pod("web", "10.0.0.1").set("metadata.name", ""),
                both()[1].clone(),
            ]),
        ),
    ];
    for (case, invalid) in cases {
        let mut folder = Folder::new();
        folder.write("a.yaml", &good);
        assert_eq!(
            folder.state(),
            (vec!["db".into(), "web".into()], vec![]),
            "{case}"
        );
        folder.write("a.yaml", &invalid);
        let (names, diagnostics) = folder.state();
        assert_eq!(names, ["db", "web"], "{case}");
        assert_eq!(diagnostics.len(), 1, "{case}: {diagnostics:?}");
        folder.write("a.yaml", &text(&both()[1..]));
        assert_eq!(
            folder.state(),
            (vec!["db".into()], vec![]),
            "{case}: a removed object is removed"
        );
    }
}

#[test]
fn typo_in_a_namespace_label_keeps_its_pods_in_the_mesh() {
    let mut folder = Folder::new();
    folder.write("pod.yaml", &text(&both()));
    folder.write("ns.yaml", &text(&[namespace("shop").ambient()]));
    folder.scan();
    let typo = namespace("shop").label("istio.io/dataplane-mode", "ambeint");
    folder.write("ns.yaml", &text(&[typo]));
    folder.scan();
    let (model, diagnostics) = compile(&folder.files.objects(), &params());
    assert!(model.workloads().all(|w| w.is_meshed()));
    assert_eq!(diagnostics[0].code, "bad_label_value");
    assert!(
        diagnostics[0].message.contains("last good version"),
        "{}",
        diagnostics[0]
    );
}

#[test]
fn recreated_pod_is_not_replaced_by_its_previous_incarnation() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &text(&[pod("web", "10.0.0.1")]));
    folder.scan();
    let recreated = pod("web", "10.0.0.2")
        .set("metadata.uid", "second")
        .label("istio.io/dataplane-mode", "typo");
    folder.write("a.yaml", &text(&[recreated]));
    folder.scan();
    let (model, _) = compile(&folder.files.objects(), &params());
    assert_eq!(&*model.workloads().next().unwrap().kube_uid, "second");
}

#[test]
fn object_that_moves_to_another_file_and_becomes_invalid_is_kept() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &text(&[pod("web", "10.0.0.1")]));
    folder.scan();
    fs::remove_file(folder.dir.path().join("a.yaml")).unwrap();
    folder.write(
        "b.yaml",
        &text(&[pod("web", "10.0.0.1").set("spec.containers", "none")]),
    );
    assert_eq!(folder.state(), (vec!["web".into()], vec!["bad_field"]));
}

#[test]
fn emptied_file_counts_only_after_the_grace_period() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &text(&both()));
    folder.scan();
    folder.write("a.yaml", "");
    assert_eq!(folder.state().0.len(), 2, "a writer may be at work");
    folder.now += Duration::from_secs(2);
    assert_eq!(folder.state().0.len(), 2, "the writer may be slow");
    folder.wait();
    assert!(folder.state().0.is_empty());
}

#[test]
fn too_large_file_is_reported_once_and_its_last_content_kept() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &text(&both()));
    folder.scan();
    let path = folder.dir.path().join("a.yaml");
    fs::File::create(&path)
        .unwrap()
        .set_len((64 << 20) + 1)
        .unwrap();
    assert_eq!(
        folder.state(),
        (vec!["db".into(), "web".into()], vec!["file_unreadable"])
    );
    assert!(!folder.scan(), "reported once");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    folder.write("a.yaml", &text(&both()[..1]));
    assert_eq!(folder.state(), (vec!["web".into()], vec![]));
}

#[test]
fn diagnostic_names_file_and_document() {
    let mut folder = Folder::new();
    folder.write(
        "sub.yaml",
        &text(&[pod("web", "10.0.0.1"), service("gone", "10.1.0.1")]),
    );
    folder.scan();
    let (_, diagnostics) = compile(&folder.files.objects(), &params());
    assert_eq!(
        diagnostics[0].to_string(),
        "sub.yaml#1: Service shop/gone: service_without_endpoints: no live pod matches its selector"
    );
}

/// AuthorizationPolicy `shop/deny` with this spec.
fn deny(spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: deny, namespace: shop}}\nspec: {spec}\n"
    )
}

impl Folder {
    /// The ports from 1 to 3 of `shop/db` that accept a connection, and the state of the first policy.
    fn open(&mut self) -> (Vec<u16>, Option<PolicyState>) {
        self.scan();
        let (model, _) = compile(&self.files.objects(), &params());
        let db = crate::testing::workload(&model, "db");
        let allowed = |port: &u16| {
            let connection = InboundConnection {
                source_identity: None,
                source_ip: "192.0.2.1".parse().unwrap(),
                source_workload: None,
                destination: (db.ips[0], *port).into(),
            };
            model.authorize(db, &connection).is_allowed()
        };
        let state = model.policies().first().map(|report| report.state);
        ((1..=3).filter(allowed).collect(), state)
    }
}

#[test]
fn policy_with_an_invalid_spec_keeps_its_last_good_version() {
    let good = deny("{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}");
    let invalid = [
        deny("{action: DENY, rules: [{to: [{operation: {ports: ['x']}}]}]}"),
        deny("{action: DENY, rulez: [{to: [{operation: {ports: ['2']}}]}]}"),
        deny("{action: PERHAPS}"),
        deny("[]"),
        good.replace("name: deny", "name: deny, labels: 5"),
        good.replace("spec", "\tspec"),
    ];
    for invalid in invalid {
        let mut folder = Folder::new();
        folder.write("pods.yaml", &text(&both()));
        folder.write("policy.yaml", &good);
        assert_eq!(folder.open(), (vec![2, 3], Some(PolicyState::Accepted)));
        folder.write("policy.yaml", &invalid);
        let (open, state) = folder.open();
        assert_eq!(open, [2, 3], "{invalid}");
        if !invalid.contains('\t') {
            assert_eq!(state, Some(PolicyState::Invalid), "{invalid}");
        }
        folder.write("policy.yaml", &good.replace("'1'", "'3'"));
        assert_eq!(folder.open(), (vec![1, 2], Some(PolicyState::Accepted)));
        fs::remove_file(folder.dir.path().join("policy.yaml")).unwrap();
        assert_eq!(folder.open(), (vec![1, 2, 3], None), "{invalid}");
    }
}

/// Covers everything around the spec: the document is still the same policy.
#[test]
fn policy_with_an_invalid_envelope_keeps_its_last_good_version() {
    let good = deny("{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}");
    let invalid = [
        good.replace("istio.io/v1", "istio.io"),
        good.replace("security.istio.io/v1", "v1"),
        good.replace("security.istio.io/v1", "security.istio.oi/v1"),
        good.replace("apiVersion: security.istio.io/v1\n", ""),
        good.replace("Policy", "policy"),
        good.replace("AuthorizationPolicy", "AuthorisationPolicy"),
        good.replace("kind: AuthorizationPolicy", "kind: [AuthorizationPolicy]"),
        good.replace("security.istio.io/v1", "policy.linkerd.io/v1"),
        good.replace("security.istio.io/v1", "example.com/v1")
            .replace("Policy", "Polciy"),
        good.replace("name: deny, ", ""),
        good.replace("name: deny", "generateName: deny"),
        good.replace("name: deny", "name: Deny"),
        good.replace("namespace: shop", "namespace: 5"),
        good.replace("{name: deny, namespace: shop}", "deny"),
    ];
    for invalid in invalid {
        let mut folder = Folder::new();
        folder.write("pods.yaml", &text(&both()));
        folder.write("policy.yaml", &good);
        assert_eq!(folder.open(), (vec![2, 3], Some(PolicyState::Accepted)));
        for _ in 0..2 {
            folder.write("policy.yaml", &invalid);
            assert_eq!(folder.open().0, [2, 3], "{invalid}");
            folder.write("policy.yaml", &(invalid.clone() + "# still invalid"));
        }
        assert_eq!(folder.open().0, [2, 3], "{invalid}");
        folder.write("policy.yaml", &good.replace("'1'", "'3'"));
        assert_eq!(folder.open(), (vec![1, 2], Some(PolicyState::Accepted)));
        fs::remove_file(folder.dir.path().join("policy.yaml")).unwrap();
        assert_eq!(folder.open(), (vec![1, 2, 3], None), "{invalid}");
    }
}

/// An object of another kind and the same name that existed before does not keep a removed policy.
#[test]
fn policy_is_removed_although_an_ignored_object_has_its_name() {
    let good = deny("{action: DENY, rules: [{}]}");
    let same_name =
        "---\napiVersion: example.com/v1\nkind: Gate\nmetadata: {name: deny, namespace: shop}\n";
    let mut folder = Folder::new();
    folder.write("pods.yaml", &text(&both()));
    folder.write("policy.yaml", &(good + same_name));
    assert_eq!(folder.open().0, [0u16; 0]);
    folder.write("policy.yaml", same_name);
    assert_eq!(folder.open(), (vec![1, 2, 3], None));
}

#[test]
fn policy_without_a_readable_name_or_namespace_gets_a_placeholder_at_start() {
    let good = deny("{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}");
    let allow = deny("{rules: [{}]}");
    let in_default = |doc: &str| doc.replace("namespace: shop", "namespace: default");
    let cases: [(String, &[u16]); 7] = [
        (good.replace("name: deny, ", ""), &[2, 3]),
        (good.replace("name: deny", "generateName: deny"), &[2, 3]),
        (allow.replace("name: deny, ", ""), &[]),
        (
            good.replace("name: deny, ", "") + "---\n" + &allow.replace("name: deny", "name: []"),
            &[],
        ),
        // The namespace of these is unknown.
        (good.replace("namespace: shop", "namespace: 5"), &[1, 2, 3]),
        (
            good.replace("{name: deny, namespace: shop}", "[]"),
            &[1, 2, 3],
        ),
        (in_default(&good).replace("name: deny, ", ""), &[1, 2, 3]),
    ];
    for (invalid, open) in cases {
        let mut folder = Folder::new();
        folder.write("pods.yaml", &text(&both()));
        folder.write("policy.yaml", &invalid);
        assert_eq!(
            folder.open(),
            (open.to_vec(), Some(PolicyState::Invalid)),
            "{invalid}"
        );
        let (model, _) = compile(&folder.files.objects(), &params());
        let report = &model.policies()[0];
        let [message] = &report.messages[..] else {
            panic!("{report:?}")
        };
        assert_eq!(message.code, "policy_stand_in");
        assert!(
            message.message.contains("a fail-closed placeholder denies"),
            "{message:?}"
        );
        // The corrected policy replaces the placeholder.
        folder.write("policy.yaml", &good);
        assert_eq!(folder.open(), (vec![2, 3], Some(PolicyState::Accepted)));
    }
}

#[test]
fn placeholder_of_unknown_namespace_denies_only_the_default_namespace() {
    let mut folder = Folder::new();
    let in_default = pod("db", "10.0.0.2").set("metadata.namespace", "default");
    folder.write("pods.yaml", &text(&[pod("web", "10.0.0.1"), in_default]));
    let invalid = deny("{rules: [{}]}").replace("namespace: shop", "namespace: 5");
    folder.write("policy.yaml", &invalid);
    assert_eq!(folder.open(), (vec![], Some(PolicyState::Invalid)));
    let (model, _) = compile(&folder.files.objects(), &params());
    assert!(crate::testing::workload(&model, "web").policies.is_empty());
}

#[test]
fn policy_that_becomes_invalid_in_a_renamed_file_keeps_its_last_good_version() {
    let good = deny("{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}");
    for invalid in [
        good.replace("spec", "\tspec"),
        good.replace("name: deny, ", ""),
    ] {
        let mut folder = Folder::new();
        folder.write("pods.yaml", &text(&both()));
        folder.write("a.yaml", &good);
        folder.scan();
        fs::remove_file(folder.dir.path().join("a.yaml")).unwrap();
        folder.write("b.yaml", &invalid);
        assert_eq!(folder.open().0, [2, 3], "{invalid}");
        let dir = folder.dir.path().to_owned();
        fs::rename(dir.join("b.yaml"), dir.join("c.yaml")).unwrap();
        assert_eq!(folder.open().0, [2, 3], "{invalid}");
    }
}

#[test]
fn intermediate_states_of_a_writer_do_not_count() {
    let good = deny("{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}");
    let other = good
        .replace("name: deny", "name: other")
        .replace("'1'", "'2'");
    let whole = format!("{good}---\n{other}");
    let mut folder = Folder::new();
    folder.write("pods.yaml", &text(&both()));
    folder.write("policy.yaml", &whole);
    assert_eq!(folder.open().0, [3]);
    let path = folder.dir.path().join("policy.yaml");
    let aside = folder.dir.path().join("aside");
    for torn in [&whole[..good.len()], &whole[..whole.len() / 2], ""] {
        folder.write("policy.yaml", torn);
        folder.scan_once();
        folder.now += STABLE_FOR / 2;
        folder.scan_once();
        folder.write("policy.yaml", &whole);
        assert_eq!(folder.open().0, [3], "{torn}");
    }
    fs::rename(&path, &aside).unwrap();
    assert_eq!(
        folder.scan_once(),
        ScanResult::Unsettled,
        "half of a move is not settled"
    );
    fs::rename(&aside, &path).unwrap();
    assert_eq!(folder.open().0, [3]);
    // A state that lasts counts.
    folder.write("policy.yaml", &good);
    assert_eq!(folder.open().0, [2, 3]);
}

/// The file stays truncated in the middle of its second policy.
#[test]
fn truncated_file_keeps_the_policies_that_it_no_longer_holds_completely() {
    let good = deny("{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}");
    let other = good
        .replace("name: deny", "name: other")
        .replace("'1'", "'2'");
    let whole = format!("{good}---\n{other}");
    for cut in good.len() + 4..whole.len() - 1 {
        let torn = &whole[..cut];
        let mut folder = Folder::new();
        folder.write("pods.yaml", &text(&both()));
        folder.write("policy.yaml", &whole);
        assert_eq!(folder.open().0, [3]);
        folder.write("policy.yaml", torn);
        let has_second_document = !torn[good.len() + 4..].trim().is_empty();
        let open = folder.open().0;
        assert!(!open.contains(&1), "{torn}");
        assert!(
            !has_second_document || !open.contains(&2),
            "{torn}: {open:?}"
        );
    }
}

#[test]
fn unsettled_changes_count_when_debounce_is_skipped() {
    let mut folder = Folder::new();
    folder.write("a.yaml", &text(&both()));
    assert_eq!(folder.scan_once(), ScanResult::Unsettled);
    let result = folder.files.scan(&params(), folder.now, Debounce::Skipped);
    assert_eq!(result, ScanResult::Changed);
    assert_eq!(folder.state().0.len(), 2);
}

#[test]
fn file_behind_a_dangling_link_is_unreadable_not_deleted() {
    let mut folder = Folder::new();
    let dir = folder.dir.path().to_owned();
    fs::create_dir(dir.join("..data")).unwrap();
    folder.write("..data/a.yaml", &text(&both()[..1]));
    folder.write("..data/b.yaml", &text(&both()[1..]));
    symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
    symlink("..data", dir.join("sub")).unwrap();
    assert_eq!(folder.state().0.len(), 2);
    fs::remove_file(dir.join("a.yaml")).unwrap();
    let (names, diagnostics) = folder.state();
    assert_eq!(
        (names.len(), diagnostics),
        (2, vec![]),
        "the other path to it is left"
    );
    fs::rename(dir.join("..data"), dir.join("..gone")).unwrap();
    symlink("..data/a.yaml", dir.join("a.yaml")).unwrap();
    let (names, diagnostics) = folder.state();
    assert_eq!(names, ["db", "web"], "dangling links");
    assert_eq!(diagnostics, ["file_unreadable"; 3]);
    assert!(!folder.scan(), "reported once");
    fs::remove_file(dir.join("sub")).unwrap();
    fs::remove_file(dir.join("a.yaml")).unwrap();
    assert_eq!(
        folder.state(),
        (vec![], vec![]),
        "removed links are deleted files"
    );
}

/// An error of another object of the same name has nothing to do with the policy.
#[test]
fn removed_policy_is_not_kept_by_an_invalid_object_of_the_same_name() {
    let denies = deny("{action: DENY, rules: [{}]}");
    let same_name = text(&[service("deny", "10.1.0.1").set("spec.clusterIP", "none at all")]);
    let mut folder = Folder::new();
    folder.write("pods.yaml", &text(&both()));
    folder.write(
        "policy.yaml",
        &format!("{denies}---\n{}", text(&[service("deny", "10.1.0.1")])),
    );
    assert_eq!(folder.open().0, Vec::<u16>::new());
    folder.write("policy.yaml", &same_name);
    assert_eq!(folder.open(), (vec![1, 2, 3], None));
}

#[test]
fn invalid_policy_without_a_good_version_denies_what_it_selects() {
    let mut folder = Folder::new();
    folder.write("pods.yaml", &text(&both()));
    folder.write("policy.yaml", &deny("{action: PERHAPS}"));
    assert_eq!(folder.open(), (vec![], Some(PolicyState::Invalid)));
}

/// At the first read there is no previous version.
#[test]
fn policy_that_is_not_yaml_denies_its_namespace_without_a_previous_version() {
    let good = deny("{action: DENY, rules: [{to: [{operation: {ports: ['1']}}]}]}");
    let invalid = good.replace("spec", "\tspec");
    let mut folder = Folder::new();
    folder.write("pods.yaml", &text(&both()));
    folder.write("policy.yaml", &invalid);
    let is_invalid = Some(PolicyState::Invalid);
    assert_eq!(folder.open(), (vec![], is_invalid));
    // The rest of the document is unknown.
    folder.write("policy.yaml", &good.replace("]}]}", "]}]"));
    assert_eq!(folder.open(), (vec![], is_invalid));
    folder.write("policy.yaml", &good);
    assert_eq!(folder.open(), (vec![2, 3], Some(PolicyState::Accepted)));
    folder.write("policy.yaml", &invalid);
    assert_eq!(folder.open(), (vec![2, 3], Some(PolicyState::Accepted)));
    // A second policy that was never valid, next to a valid one.
    folder.write(
        "policy.yaml",
        &format!("{good}---\n{}", invalid.replace("deny", "other")),
    );
    assert_eq!(folder.open().0, Vec::<u16>::new());

    let mut folder = Folder::new();
    folder.write("pods.yaml", &text(&both()));
    let of_another = "{kind: AuthorizationPolicy, metadata: {namespace: bank, name: x}";
    folder.write("policy.yaml", of_another);
    assert_eq!(folder.open(), (vec![1, 2, 3], is_invalid));
}

#[test]
fn policy_report_has_the_errors_of_the_rejected_version() {
    let mut folder = Folder::new();
    folder.write("pods.yaml", &text(&both()));
    folder.write("policy.yaml", &deny("{action: DENY, rules: [{}]}"));
    folder.scan();
    folder.write("policy.yaml", &deny("{action: PERHAPS}"));
    folder.scan();
    let (model, _) = compile(&folder.files.objects(), &params());
    let [message] = &model.policies()[0].messages[..] else {
        panic!("{:?}", model.policies())
    };
    assert_eq!(message.code, "unknown_action");
    assert!(
        message.message.contains("last good version stays"),
        "{}",
        message.message
    );
}

#[test]
fn unchanged_policies_of_an_edited_file_stay_the_same_objects() {
    let policy = |name: &str, port: &str| {
        let spec =
            format!("{{action: DENY, rules: [{{to: [{{operation: {{ports: ['{port}']}}}}]}}]}}");
        format!(
            "---\n{}",
            deny(&spec).replace("name: deny", &format!("name: {name}"))
        )
    };
    let mut folder = Folder::new();
    let policies = |folder: &mut Folder| {
        folder.scan();
        let objects = folder.files.objects().authorization_policies.into_values();
        objects.map(|o| o.object).collect::<Vec<_>>()
    };
    folder.write("p.yaml", &(policy("a", "1") + &policy("b", "1")));
    let before = policies(&mut folder);
    folder.write(
        "p.yaml",
        &(policy("new", "1") + &policy("a", "1") + &policy("b", "2")),
    );
    let after = policies(&mut folder);
    assert!(Arc::ptr_eq(&before[0], &after[0]));
    assert!(before[1] != after[1] && after.len() == 3);
}
