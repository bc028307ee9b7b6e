//! `ambit ca` as a user runs it: the shipped binary with its files, its tokens, its refusals and its
//! end, asked by callers of every kind.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use ambit_e2e::ca::{Ask, Caller, Csr, calling, claims, signed, unix_time};
use ambit_e2e::identity::{held, identity};
use ambit_e2e::manifest::{self, Pod};
use ambit_e2e::metrics;
use ambit_e2e::programs::{PORT, curl, nginx, url};
use anyhow::{Context, Result, bail, ensure};
use lab::{IdentitySource, IpFamily, Lab, LaunchOptions, Location, Options, ProgramState};
use rcgen::SanType;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tonic::{Code, Status};
use x509_parser::prelude::{GeneralName, X509Certificate};

/// The caller of most tests, and whom it may ask for.
const NODE: &str = "istio-system/ztunnel";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";

/// How long a refusal may take to show.
const DENIED: Duration = Duration::from_secs(10);

/// The authority's metrics.
const METRICS: ([u8; 4], u16) = ([127, 0, 0, 1], 15014);

/// An authority alone, without nodes.
fn alone(args: &[&str]) -> Result<Lab> {
    let options = Options {
        run_daemons: false,
        identity: IdentitySource::Ca,
        ca_launch: LaunchOptions::args(args),
        ..Options::default()
    };
    Lab::up("", options)
}

fn token(lab: &Lab, account: &str, impersonate: &[&str]) -> Result<String> {
    signed(&lab.token_file("key.pem"), &claims(account, impersonate)?)
}

async fn ask(caller: &Caller, token: &str, csr: &Csr) -> Result<Vec<String>, Status> {
    let ask = Ask {
        token: Some(token),
        csr: &csr.pem,
        identity: Some(WEB),
        seconds: 3600,
    };
    caller.ask(ask).await
}

/// The names in a leaf, and whether it is an authority.
fn names(pem: &str) -> Result<(Vec<String>, bool)> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).context("PEM")?;
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).context("certificate")?;
    ensure!(
        leaf.subject().as_raw().len() <= 2,
        "a subject: {}",
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

fn refused(answer: Result<Vec<String>, Status>, code: Code, reason: &str) -> Result<()> {
    match answer {
        Err(status) if status.code() == code && status.message().starts_with(reason) => Ok(()),
        other => bail!("{code:?} {reason} was expected, not {other:?}"),
    }
}

#[test]
fn the_first_start_makes_files_for_the_owner_alone_and_the_next_ones_use_them() -> Result<()> {
    let lab = alone(&[])?;
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
            "{} may be read by others: {mode:o}",
            file.display()
        );
    }
    let token = token(&lab, NODE, &["shop/*"])?;
    let first = calling(&lab, async |caller| {
        Ok(ask(&caller, &token, &Csr::plain()?).await?)
    })?;
    lab.stop_ca()?;
    let ca = lab.status()?.ca.context("no authority")?;
    ensure!(
        matches!(&ca.state, ProgramState::Exited(how) if how.contains("exit status: 0")),
        "SIGTERM: {:?}",
        ca.state
    );
    lab.start_ca()?;
    let second = calling(&lab, async |caller| {
        Ok(ask(&caller, &token, &Csr::plain()?).await?)
    })?;
    ensure!(
        first.last() == second.last(),
        "another root after a restart"
    );
    ensure!(
        root == read("root-cert.pem")? && key == read("ca-key.pem")?,
        "other files"
    );
    Ok(())
}

/// All files of a folder and of those in it.
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

/// Tokens that prove nothing, each with its reason; `folder` is for keys of others.
fn bad_tokens(lab: &Lab, folder: &Path) -> Result<Vec<(&'static str, Option<String>)>> {
    let key = lab.token_file("key.pem");
    let own = |change: &dyn Fn(&mut ambit::ca::Claims)| -> Result<Option<String>> {
        let mut claims = claims(NODE, &["shop/*"])?;
        change(&mut claims);
        signed(&key, &claims).map(Some)
    };
    let (strange, public) = (folder.join("key"), folder.join("public"));
    ambit::ca::create_keys(&strange, &public)?;
    let strange = signed(&strange, &claims(NODE, &["shop/*"])?)?;
    Ok(vec![
        ("no_token", None),
        ("token_malformed", Some("not a token".to_owned())),
        ("token_signature", Some(strange)),
        // Used again after its end, by more than clocks may be apart.
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

/// Identities for which a good token does not speak, each with its reason.
const FOREIGN: [(&str, &str); 3] = [
    ("not_allowed", "spiffe://cluster.local/ns/shop/sa/bank"),
    ("not_allowed", "spiffe://cluster.local/ns/others/sa/web"),
    ("foreign_trust_domain", "spiffe://elsewhere/ns/shop/sa/web"),
];

#[test]
fn only_who_proves_to_be_somebody_is_answered_and_only_for_whom_it_may_speak() -> Result<()> {
    let lab = alone(&[])?;
    let good = token(&lab, NODE, &["shop/web", "other/*"])?;
    let folder = tempfile::tempdir()?;
    let bad = bad_tokens(&lab, folder.path())?;
    let any = "spiffe://cluster.local/ns/other/sa/any";
    let own = "spiffe://cluster.local/ns/istio-system/sa/ztunnel";
    calling(&lab, async |caller| {
        let csr = Csr::plain()?;
        let ask = async |token, identity| {
            let ask = Ask {
                token,
                csr: &csr.pem,
                identity,
                seconds: 3600,
            };
            caller.ask(ask).await
        };
        for (reason, token) in &bad {
            let answer = ask(token.as_deref(), Some(WEB)).await;
            refused(answer, Code::Unauthenticated, reason)?;
        }
        for (reason, identity) in FOREIGN {
            let answer = ask(Some(good.as_str()), Some(identity)).await;
            refused(answer, Code::PermissionDenied, reason)?;
        }
        for (asked, is) in [(Some(WEB), WEB), (Some(any), any), (None, own)] {
            let answer = ask(Some(good.as_str()), asked).await?;
            let (names, authority) = names(&answer[0])?;
            ensure!(
                names == [is] && !authority,
                "{asked:?}: {names:?} {authority}"
            );
        }
        Ok(())
    })?;
    let reasons = bad.iter().map(|(reason, _)| *reason);
    refusals_are_told(&lab, reasons.chain(FOREIGN.map(|(reason, _)| reason)))?;
    let tokens = bad.into_iter().filter_map(|(_, token)| token);
    never_said(&lab, tokens.chain([good]))
}

/// Each reason is counted and logged.
fn refusals_are_told<'a>(lab: &Lab, reasons: impl Iterator<Item = &'a str>) -> Result<()> {
    let metrics = metrics::parse(
        &lab.http_get(&Location::Fabric, METRICS.into(), "/metrics")?
            .ok()?,
    );
    let log = lab.ca_log()?;
    for reason in reasons {
        let counted = metrics::sum(&metrics, "ambit_ca_refused_total", &[("reason", reason)]);
        ensure!(counted >= 1.0, "{reason} was not counted");
        ensure!(
            log.contains(&format!("reason=\"{reason}\"")),
            "{reason} is not in {log}"
        );
    }
    Ok(())
}

/// No token's signature is in the authority's log or metrics, and no key.
fn never_said(lab: &Lab, tokens: impl Iterator<Item = String>) -> Result<()> {
    let metrics = lab
        .http_get(&Location::Fabric, METRICS.into(), "/metrics")?
        .ok()?;
    let said = lab.ca_log()? + &metrics;
    for token in tokens.filter(|token| token.contains('.')) {
        let signature = token.rsplit('.').next().unwrap_or_default();
        ensure!(
            signature.len() > 20 && !said.contains(signature),
            "a token was said"
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
            ensure!(!said.contains(line), "a key was said");
        }
    }
    ensure!(!said.contains("PRIVATE KEY"), "a key was said");
    Ok(())
}

#[test]
fn nothing_that_a_request_wishes_for_is_in_the_certificate() -> Result<()> {
    let lab = alone(&["--max-ttl", "2h"])?;
    let token = token(&lab, NODE, &["shop/web"])?;
    let uri = |uri: &str| Ok::<_, rcgen::Error>(SanType::URI(uri.try_into()?));
    let wishes = vec![
        uri("spiffe://cluster.local/ns/shop/sa/bank")?,
        uri("spiffe://cluster.local/ns/istio-system/sa/istiod")?,
        SanType::DnsName("istiod.istio-system.svc".try_into()?),
        SanType::IpAddress([10, 96, 0, 1].into()),
    ];
    let greedy = Csr::new(wishes, Some("admin"), true)?;
    let mut forged = Csr::plain()?;
    // The signature of one request on the key of another.
    forged.pem = graft(&forged.pem, &Csr::plain()?.pem)?;
    let weak = weak_request()?;
    calling(&lab, async |caller| {
        let answer = ask(&caller, &token, &greedy).await?;
        let (names, authority) = names(&answer[0])?;
        ensure!(names == [WEB] && !authority, "{names:?} {authority}");
        for (csr, reason) in [
            (forged.pem.as_str(), "csr_signature"),
            (weak.as_str(), "csr_key"),
            ("-----BEGIN", "csr_malformed"),
            (&"x".repeat(20_000), "csr_malformed"),
        ] {
            let ask = Ask {
                token: Some(&token),
                csr,
                identity: Some(WEB),
                seconds: 3600,
            };
            refused(caller.ask(ask).await, Code::InvalidArgument, reason)?;
        }
        // A life that is too long is cut, one that is too short refused.
        for (seconds, life) in [(1_000_000, 7200), (0, 7200), (60, 60)] {
            let ask = Ask {
                token: Some(&token),
                csr: &greedy.pem,
                identity: Some(WEB),
                seconds,
            };
            let left = life_left(&caller.ask(ask).await?[0])?;
            ensure!(
                (life - 30..=life).contains(&left),
                "{seconds} s: {left} s left, not {life}"
            );
        }
        let ask = Ask {
            token: Some(&token),
            csr: &greedy.pem,
            identity: Some(WEB),
            seconds: 1,
        };
        refused(
            caller.ask(ask).await,
            Code::InvalidArgument,
            "ttl_too_short",
        )
    })
}

fn life_left(pem: &str) -> Result<i64> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).context("PEM")?;
    let (_, leaf) = x509_parser::parse_x509_certificate(&der).context("certificate")?;
    let now = i64::try_from(unix_time(0))?;
    Ok(leaf.validity().not_after.timestamp() - now)
}

/// A request's content with the signature of another: both end in a signature of P-256, whose length
/// varies, so several are tried until two are of one length.
fn graft(content: &str, signature: &str) -> Result<String> {
    let der = |text: &str| -> Result<Vec<u8>> {
        let der = rustls_pki_types::CertificateSigningRequestDer::from_pem_slice(text.as_bytes());
        Ok(der.context("PEM")?.to_vec())
    };
    let mut content = der(content)?;
    let mut other = der(signature)?;
    while other.len() != content.len() {
        other = der(&Csr::plain()?.pem)?;
    }
    // The last 16 octets are the end of the number s.
    let (from, at) = (other.len() - 16, content.len() - 16);
    content[at..].copy_from_slice(&other[from..]);
    let body = base64_lines(&content);
    Ok(format!(
        "-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"
    ))
}

fn base64_lines(der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines = text.as_bytes().chunks(64);
    lines
        .map(|line| String::from_utf8_lossy(line).into_owned() + "\n")
        .collect()
}

/// Of RSA with 1024 bits, which rcgen makes no keys of.
fn weak_request() -> Result<String> {
    let output = std::process::Command::new("openssl")
        .args([
            "req",
            "-new",
            "-newkey",
            "rsa:1024",
            "-nodes",
            "-keyout",
            "/dev/null",
        ])
        .args(["-subj", "/CN=weak"])
        .output()?;
    ensure!(
        output.status.success(),
        "openssl: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn a_thousand_requests_at_once_are_all_answered_each_for_its_own_key() -> Result<()> {
    const REQUESTS: usize = 1000;
    let lab = alone(&[])?;
    let token = token(&lab, NODE, &["shop/web"])?;
    let csrs: Vec<Csr> = (0..REQUESTS).map(|_| Csr::plain()).collect::<Result<_>>()?;
    let begun = Instant::now();
    let leaves = calling(&lab, async |caller| {
        let mut asking = tokio::task::JoinSet::new();
        for (index, csr) in csrs.iter().enumerate() {
            let (caller, token, pem) = (caller.clone(), token.clone(), csr.pem.clone());
            asking.spawn(async move {
                let ask = Ask {
                    token: Some(&token),
                    csr: &pem,
                    identity: Some(WEB),
                    seconds: 3600,
                };
                (index, caller.ask(ask).await)
            });
        }
        let mut leaves = vec![String::new(); REQUESTS];
        while let Some(answer) = asking.join_next().await {
            let (index, answer) = answer?;
            leaves[index] = answer?.swap_remove(0);
        }
        Ok(leaves)
    })?;
    // Each within the caller's deadline.
    println!("{REQUESTS} certificates in {:?}", begun.elapsed());
    let mut serials = BTreeSet::new();
    for (leaf, csr) in leaves.iter().zip(&csrs) {
        let der = CertificateDer::from_pem_slice(leaf.as_bytes()).context("PEM")?;
        let (_, leaf) = x509_parser::parse_x509_certificate(&der).context("certificate")?;
        let key = rcgen::PublicKeyData::subject_public_key_info(&csr.key);
        ensure!(leaf.public_key().raw == key, "a leaf with another's key");
        serials.insert(leaf.raw_serial().to_vec());
    }
    ensure!(
        serials.len() == REQUESTS,
        "{} serial numbers",
        serials.len()
    );
    never_said(&lab, [token].into_iter())
}

/// A node whose token does not cover a pod: its identity is refused, and the pod has no traffic.
#[test]
fn a_pod_that_its_nodes_token_does_not_cover_fails_closed() -> Result<()> {
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
    let refused = lab.wait_until("its identity to be refused", DENIED, || {
        let held = held(&lab, "a", &identity("intruder")).ok()??;
        held.state.contains("ca_denied").then_some(held)
    })?;
    ensure!(refused.serial.is_empty(), "{:?}", refused.entry);
    let to = url(lab.pod_ip("shop/web", IpFamily::V4)?, PORT);
    let soon = ["--connect-timeout", "2"];
    let ask = |pod: &str| curl(&lab, &Location::pod(pod), &to, &soon);
    ensure!(ask("shop/client")?.body == "web");
    ensure!(
        ask("shop/intruder").is_err(),
        "it had traffic without an identity"
    );
    let status = lab.status()?;
    ensure!(!status.pod("shop/intruder")?.ready, "it was started");
    let denied = [("reason", "ca_denied")];
    metrics::wait(&lab, "a", "ambit_certificate_failures_total", &denied, 1.0)?;
    let log = lab.daemon_log("a")?;
    let said = |line: &str| line.contains("ca_denied") && line.contains("intruder");
    ensure!(log.lines().any(said), "the log does not say so: {log}");
    Ok(())
}
