//! `ambit ca`, the shipped binary: its files, its shutdown, which requests it refuses, and a node whose token is too narrow.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use ambit_e2e::ca::{
    CaClient, CsrRequest, csr, sign_token, token_claims, unix_time, with_ca_client,
};
use ambit_e2e::identity::{cert_status, identity};
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::metrics;
use ambit_e2e::programs::{PORT, curl, nginx, url};
use anyhow::{Context, Result, bail, ensure};
use lab::{IdentitySource, IpFamily, Lab, LaunchOptions, Location, Options, ProgramState};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tonic::{Code, Status};
use x509_parser::prelude::{GeneralName, X509Certificate};

/// The service account whose token most tests use, and the identity that they request.
const NODE: &str = "istio-system/ztunnel";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// How long a refusal may take to appear in the dump.
const REFUSAL_DEADLINE: Duration = Duration::from_secs(10);

/// The authority's metrics address.
const METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 15014);

/// Brings up an authority without nodes.
fn ca_only(args: &[&str]) -> Result<Lab> {
    let options = Options {
        run_daemons: false,
        identity: IdentitySource::Ca,
        ca_launch: LaunchOptions::args(args),
        ..Options::default()
    };
    Lab::up("", options)
}

fn token(lab: &Lab, account: &str, impersonate: &[&str]) -> Result<String> {
    sign_token(
        &lab.token_file("key.pem"),
        &token_claims(account, impersonate)?,
    )
}

async fn request_web(client: &CaClient, token: &str, csr: &str) -> Result<Vec<String>, Status> {
    let request = CsrRequest {
        token: Some(token),
        csr,
        identity: Some(WEB),
        seconds: 3600,
    };
    client.request_certificate(request).await
}

/// The names in a leaf, and whether it is a CA certificate.
fn leaf_names(pem: &str) -> Result<(Vec<String>, bool)> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).context("PEM")?;
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).context("certificate")?;
    ensure!(
        leaf.subject().as_raw().len() <= 2,
        "the leaf has a subject: {}",
        leaf.subject()
    );
    Ok((all_names(&leaf)?, leaf.is_ca()))
}

fn all_names(leaf: &X509Certificate<'_>) -> Result<Vec<String>> {
    let names = leaf.subject_alternative_name()?.context("no names")?;
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => (*uri).to_owned(),
        other => format!("{other:?}"),
    };
    Ok(names.value.general_names.iter().map(name).collect())
}

fn check_refused(result: Result<Vec<String>, Status>, code: Code, reason: &str) -> Result<()> {
    match result {
        Err(status) if status.code() == code && status.message().starts_with(reason) => Ok(()),
        other => bail!("expected {code:?} {reason}, got {other:?}"),
    }
}

#[test]
fn first_start_creates_private_files_and_later_starts_reuse_them() -> Result<()> {
    let lab = ca_only(&[])?;
    let read = |name: &str| std::fs::read(lab.ca_folder().join(name)).context("read");
    let (root, key) = (read("root-cert.pem")?, read("ca-key.pem")?);
    let mut private = vec![
        lab.ca_folder().join("ca-key.pem"),
        lab.token_file("key.pem"),
    ];
    for entry in walk(&lab.ca_folder().join("state"))? {
        private.push(entry);
    }
    for file in private {
        let mode = std::fs::metadata(&file)?.permissions().mode() & 0o777;
        ensure!(
            mode & 0o077 == 0,
            "{} is readable by others: {mode:o}",
            file.display()
        );
    }
    let token = token(&lab, NODE, &["shop/*"])?;
    let first = with_ca_client(&lab, async |client| {
        Ok(request_web(&client, &token, &csr()?).await?)
    })?;
    lab.stop_ca()?;
    let ca = lab.status()?.ca.context("the lab has no authority")?;
    ensure!(
        matches!(&ca.state, ProgramState::Exited(how) if how.contains("exit status: 0")),
        "SIGTERM: {:?}",
        ca.state
    );
    lab.start_ca()?;
    let second = with_ca_client(&lab, async |client| {
        Ok(request_web(&client, &token, &csr()?).await?)
    })?;
    ensure!(
        first.last() == second.last(),
        "the root changed at a restart"
    );
    ensure!(
        root == read("root-cert.pem")? && key == read("ca-key.pem")?,
        "the root or key file changed at a restart"
    );
    Ok(())
}

/// All files in a folder, recursively.
fn walk(folder: &std::path::Path) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(walk(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}

/// Invalid tokens, each with its refusal reason. `folder` takes the keys of another authority.
fn invalid_tokens(lab: &Lab, folder: &Path) -> Result<Vec<(&'static str, Option<String>)>> {
    let key = lab.token_file("key.pem");
    let own = |change: &dyn Fn(&mut ambit::ca::Claims)| -> Result<Option<String>> {
        let mut claims = token_claims(NODE, &["shop/*"])?;
        change(&mut claims);
        sign_token(&key, &claims).map(Some)
    };
    let (other_key, public) = (folder.join("key"), folder.join("public"));
    ambit::ca::create_keys(&other_key, &public)?;
    let other_token = sign_token(&other_key, &token_claims(NODE, &["shop/*"])?)?;
    Ok(vec![
        ("no_token", None),
        ("token_malformed", Some("not a token".to_owned())),
        ("token_signature", Some(other_token)),
        // Expired for longer than the tolerated clock difference.
        (
            "token_expired",
            own(&|claims| claims.exp = unix_time(-600))?,
        ),
        (
            "token_audience",
            own(&|claims| claims.aud = vec!["other".to_owned()])?,
        ),
        (
            "token_claims",
            own(&|claims| claims.sub = "root".to_owned())?,
        ),
    ])
}

/// Identities that the valid token may not request, each with its refusal reason.
const NOT_ALLOWED: [(&str, &str); 3] = [
    ("not_allowed", "spiffe://cluster.local/ns/shop/sa/bank"),
    ("not_allowed", "spiffe://cluster.local/ns/others/sa/web"),
    ("foreign_trust_domain", "spiffe://elsewhere/ns/shop/sa/web"),
];

#[test]
fn requests_need_a_valid_token_that_allows_the_identity() -> Result<()> {
    let lab = ca_only(&[])?;
    let valid = token(&lab, NODE, &["shop/web", "other/*"])?;
    let folder = tempfile::tempdir()?;
    let invalid = invalid_tokens(&lab, folder.path())?;
    let any = "spiffe://cluster.local/ns/other/sa/any";
    let own = "spiffe://cluster.local/ns/istio-system/sa/ztunnel";
    with_ca_client(&lab, async |client| {
        let csr = csr()?;
        let send = async |token, identity| {
            let request = CsrRequest {
                token,
                csr: &csr,
                identity,
                seconds: 3600,
            };
            client.request_certificate(request).await
        };
        for (reason, token) in &invalid {
            let result = send(token.as_deref(), Some(WEB)).await;
            check_refused(result, Code::Unauthenticated, reason)?;
        }
        for (reason, identity) in NOT_ALLOWED {
            let result = send(Some(valid.as_str()), Some(identity)).await;
            check_refused(result, Code::PermissionDenied, reason)?;
        }
        for (requested, expected) in [(Some(WEB), WEB), (Some(any), any), (None, own)] {
            let chain = send(Some(valid.as_str()), requested).await?;
            let (names, is_ca) = leaf_names(&chain[0])?;
            ensure!(
                names == [expected] && !is_ca,
                "{requested:?}: {names:?}, CA: {is_ca}"
            );
        }
        Ok(())
    })?;
    let reasons = invalid.iter().map(|(reason, _)| *reason);
    check_refusals_reported(&lab, reasons.chain(NOT_ALLOWED.map(|(reason, _)| reason)))?;
    let tokens = invalid.into_iter().filter_map(|(_, token)| token);
    check_no_secrets(&lab, tokens.chain([valid]))
}

/// Checks that each reason is counted and logged.
fn check_refusals_reported<'a>(lab: &Lab, reasons: impl Iterator<Item = &'a str>) -> Result<()> {
    let metrics = metrics::parse(
        &lab.http_get(&Location::Fabric, METRICS.into(), "/metrics")?
            .ok()?,
    );
    let log = lab.ca_log()?;
    for reason in reasons {
        let counted = metrics::sum(&metrics, "ambit_ca_refused_total", &[("reason", reason)]);
        ensure!(counted >= 1.0, "{reason} is not counted");
        ensure!(
            log.contains(&format!("reason=\"{reason}\"")),
            "{reason} is not in {log}"
        );
    }
    Ok(())
}

/// Checks that no token signature and no key is in the authority's log or metrics.
fn check_no_secrets(lab: &Lab, tokens: impl Iterator<Item = String>) -> Result<()> {
    let metrics = lab
        .http_get(&Location::Fabric, METRICS.into(), "/metrics")?
        .ok()?;
    let output = lab.ca_log()? + &metrics;
    for token in tokens.filter(|token| token.contains('.')) {
        let signature = token.rsplit('.').next().unwrap_or_default();
        ensure!(
            signature.len() > 20 && !output.contains(signature),
            "a token signature is in the output"
        );
    }
    for file in [
        lab.ca_folder().join("ca-key.pem"),
        lab.token_file("key.pem"),
    ] {
        let key = std::fs::read_to_string(file)?;
        for line in key
            .lines()
            .filter(|line| line.len() > 20 && !line.starts_with("---"))
        {
            ensure!(!output.contains(line), "a key is in the output");
        }
    }
    ensure!(!output.contains("PRIVATE KEY"), "a key is in the output");
    Ok(())
}

/// The node's token does not allow the pod's identity: it is refused, and the pod has no traffic.
#[test]
fn pod_outside_its_nodes_token_has_no_traffic() -> Result<()> {
    let web = Pod::new("shop", "web").on("b").port(None, PORT);
    let scene = manifest::all([
        manifest::two_nodes(),
        manifest::namespace("shop", Some("ambient")),
        web.runs(nginx(&[PORT], "web")).into(),
        Pod::new("shop", "client").on("a").into(),
    ]);
    let options = Options {
        identity: IdentitySource::Ca,
        ..Options::default()
    };
    let lab = Lab::up(scene, options)?;
    let narrow = token(&lab, NODE, &["shop/client"])?;
    std::fs::write(lab.token_file("a"), narrow)?;
    let intruder = Pod::new("shop", "intruder").on("a");
    lab.apply(String::from(intruder))?;
    let refused = lab.wait_until("the identity to be refused", REFUSAL_DEADLINE, || {
        let status = cert_status(&lab, "a", &identity("intruder")).ok()??;
        status.state.contains("ca_denied").then_some(status)
    })?;
    ensure!(refused.serial.is_empty(), "{:?}", refused.entry);
    let to = url(lab.pod_ip("shop/web", IpFamily::V4)?, PORT);
    let timeout = ["--connect-timeout", "2"];
    let request = |pod: &str| curl(&lab, &Location::pod(pod), &to, &timeout);
    ensure!(request("shop/client")?.body == "web");
    ensure!(
        request("shop/intruder").is_err(),
        "the pod had traffic without an identity"
    );
    let status = lab.status()?;
    ensure!(
        !status.pod("shop/intruder")?.ready,
        "the pod is ready without an identity"
    );
    let denied = [("reason", "ca_denied")];
    metrics::wait(&lab, "a", "ambit_certificate_failures_total", &denied, 1.0)?;
    let log = lab.daemon_log("a")?;
    let is_denied = |line: &str| line.contains("ca_denied") && line.contains("intruder");
    ensure!(log.lines().any(is_denied), "no such line in the log: {log}");
    Ok(())
}
