//! Clients that attack an HBONE port before they have a tunnel, and members that ask for addresses that are not the
//! pod's: the daemon refuses each with its reason, keeps running within its memory bound, and no other client is
//! affected.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use ambit_e2e::hostile::{
    ALPN_H2, AttackFixture, ConnectResult, DaemonMonitor, Leaf, MEMBER_IDENTITY, Netns, PREFACE,
    STREAM_WINDOW_BYTES, TLS13_ONLY, TestCa, TlsClient, Tunnel,
};
use ambit_e2e::programs::PORT;
use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Location};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Reads until the peer ends the connection, orderly or not.
async fn read_to_end(stream: &mut (impl AsyncReadExt + Unpin)) {
    let mut buffer = [0; 4096];
    while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}

/// Sends bytes without TLS, and waits for the end of the connection.
async fn send_plain(netns: &Netns, to: SocketAddr, bytes: &[u8]) -> Result<()> {
    let mut stream = netns.connect(to).await?;
    // The daemon may close before it has read everything.
    let _ = stream.write_all(bytes).await;
    read_to_end(&mut stream).await;
    Ok(())
}

/// Checks that no request is answered over a tunnel with this certificate.
async fn check_refused(netns: &Netns, to: SocketAddr, leaf: &Leaf) -> Result<()> {
    let Ok(mut tunnel) = Tunnel::open(
        &TlsClient::with_certificate(leaf),
        netns,
        to,
        STREAM_WINDOW_BYTES,
    )
    .await
    else {
        return Ok(());
    };
    let result = tunnel
        .connect(&SocketAddr::new(to.ip(), PORT).to_string())
        .await?;
    ensure!(
        result == ConnectResult::Closed,
        "the CONNECT was answered: {result:?}"
    );
    Ok(())
}

#[test]
fn connections_without_hbone_are_refused_as_peer_not_hbone() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let garbage: Vec<u8> = (0..64 * 1024_u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0])
        .collect();
    for bytes in [
        &garbage[..],
        b"\x16\x03\x01\xff\xff",
        b"\n\n\n\n\n\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        PREFACE,
    ] {
        fixture.attack(&["peer_not_hbone"], async |netns, to| {
            send_plain(netns, to, bytes).await
        })?;
    }
    let leaf = fixture.ca.leaf(&[MEMBER_IDENTITY])?;
    let tls12 = TlsClient {
        versions: &[&rustls::version::TLS12],
        ..TlsClient::with_certificate(&leaf)
    };
    fixture.attack(&["peer_not_hbone"], async |netns, to| {
        ensure!(
            tls12.handshake(netns, to).await.is_err(),
            "TLS 1.2 was accepted"
        );
        Ok(())
    })?;
    for alpn in [&[&b"http/1.1"[..]][..], &[]] {
        let client = TlsClient {
            alpn,
            ..TlsClient::with_certificate(&leaf)
        };
        fixture.attack(&["peer_not_hbone"], async |netns, to| {
            if let Ok(mut stream) = client.handshake(netns, to).await {
                let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
                read_to_end(&mut stream).await;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A program that connects to the HBONE port `$0`, a text that it must print on stderr, and the daemon's reason.
const PROGRAMS: [(&str, &str, &str); 6] = [
    ("curl -sS -m 20 http://$0/", "curl: (", "peer_not_hbone"),
    (
        "curl -sSk -m 20 https://$0/",
        "curl: (",
        "peer_without_certificate",
    ),
    (
        "openssl s_client -connect $0 -tls1_2 </dev/null",
        "alert protocol version",
        "peer_not_hbone",
    ),
    (
        "echo GET / | openssl s_client -quiet -connect $0 -alpn h2",
        "alert certificate required",
        "peer_without_certificate",
    ),
    ("echo hello | socat -t20 - TCP:$0", "", "peer_not_hbone"),
    (
        "head -c 100000 /dev/urandom | socat -t20 - TCP:$0",
        "",
        "peer_not_hbone",
    ),
];

#[test]
fn ordinary_clients_are_disconnected_without_a_response() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let (to, from) = (
        fixture.hbone_address().to_string(),
        fixture.lab.pod_ip("outsider", IpFamily::V4)?,
    );
    for (program, error_text, reason) in PROGRAMS {
        let monitor = DaemonMonitor::start(&fixture.lab, "b")?;
        let command = ["sh", "-c", program, &to];
        let place = Location::pod("outsider");
        let output = fixture
            .lab
            .exec_in(&place, &command, Duration::from_secs(30))
            .with_context(|| format!("{program} was not disconnected"))?;
        let stderr = &output.stderr;
        ensure!(
            stderr.contains(error_text) && !stderr.contains("timed out"),
            "{program} printed {stderr}"
        );
        ensure!(
            error_text.is_empty() || !output.success(),
            "{program} succeeded"
        );
        ensure!(
            !output.stdout.contains("HTTP/"),
            "{program} received a response: {}",
            output.stdout
        );
        monitor
            .wait_failure_of(&[reason], from)
            .with_context(|| program.to_owned())?;
    }
    fixture.check_neighbour()
}

#[test]
fn invalid_client_certificates_are_refused() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let anonymous = TlsClient {
        certificate: None,
        alpn: ALPN_H2,
        versions: TLS13_ONLY,
    };
    fixture.attack(&["peer_without_certificate"], async |netns, to| {
        if let Ok(mut stream) = anonymous.handshake(netns, to).await {
            read_to_end(&mut stream).await;
        }
        Ok(())
    })?;
    let now = SystemTime::now();
    let (hour, past) = (Duration::from_secs(3600), now - Duration::from_secs(7200));
    let second = "spiffe://cluster.local/ns/shop/sa/web";
    for (what, leaf) in [
        (
            "of another root",
            TestCa::untrusted()?.leaf(&[MEMBER_IDENTITY])?,
        ),
        (
            "expired",
            fixture
                .ca
                .leaf_valid(&[MEMBER_IDENTITY], past, past + hour)?,
        ),
        (
            "not yet valid",
            fixture
                .ca
                .leaf_valid(&[MEMBER_IDENTITY], now + hour, now + 2 * hour)?,
        ),
        ("without a name", fixture.ca.leaf(&[])?),
        (
            "with another kind of URI",
            fixture
                .ca
                .leaf(&["https://cluster.local/ns/shop/sa/member"])?,
        ),
        (
            "with a malformed SPIFFE id",
            fixture.ca.leaf(&["spiffe://cluster.local/ns//sa/%2e"])?,
        ),
        (
            "with two names",
            fixture.ca.leaf(&[MEMBER_IDENTITY, second])?,
        ),
    ] {
        fixture
            .attack(&["peer_untrusted"], async |netns, to| {
                check_refused(netns, to, &leaf).await
            })
            .with_context(|| format!("a certificate {what}"))?;
    }
    Ok(())
}

#[test]
fn stalled_handshakes_end_at_their_deadline() -> Result<()> {
    /// Connections of each kind: more than a listen backlog, fewer than a pod may have open.
    const PER_KIND: usize = 100;
    let mut fixture = AttackFixture::up()?;
    let leaf = fixture.ca.leaf(&[MEMBER_IDENTITY])?;
    fixture.attack(&["tls_handshake_timeout"], async |netns, to| {
        let mut stalled = Vec::new();
        for _ in 0..PER_KIND {
            // Sends nothing.
            stalled.push(netns.connect(to).await?);
            // The start of a ClientHello: 6 of the record's 512 bytes.
            let mut half = netns.connect(to).await?;
            half.write_all(&[0x16, 3, 1, 2, 0, 1]).await?;
            stalled.push(half);
        }
        // A byte every half second: the socket is active, and the handshake deadline still applies.
        let mut slow = netns.connect(to).await?;
        slow.write_all(&[0x16, 3, 1, 2, 0]).await?;
        let (mut read, mut write) = slow.split();
        let send_slowly = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(500));
            while write.write_all(&[0]).await.is_ok() {
                ticks.tick().await;
            }
        };
        tokio::select! {
            () = read_to_end(&mut read) => {}
            () = send_slowly => {}
        }
        for stream in &mut stalled {
            read_to_end(stream).await;
        }
        Ok(())
    })?;
    fixture.attack_from(
        &fixture.member.clone(),
        &["h2_handshake_timeout"],
        &async |netns: &Netns, to| {
            let mut stream = TlsClient::with_certificate(&leaf)
                .handshake(netns, to)
                .await?;
            read_to_end(&mut stream).await;
            Ok(())
        },
    )
}

#[test]
fn connect_to_any_address_but_the_dialled_pod_is_refused() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let lab = &fixture.lab;
    let other = lab.pod_ip("other", IpFamily::V4)?;
    let node: IpAddr = lab.node_ip("b", IpFamily::V4)?;
    let target = fixture.target;
    let v6 = lab.pod_ip("web", IpFamily::V6)?;
    let foreign: Vec<SocketAddr> = [
        (other, PORT),
        (other, 15008),
        (v6, PORT),
        (node, 15000),
        (node, 15020),
        (node, 15021),
        ([127, 0, 0, 1].into(), PORT),
        ([127, 0, 0, 1].into(), 15000),
        ([127, 0, 0, 1].into(), 15001),
        ([0, 0, 0, 0].into(), PORT),
        ([169, 254, 169, 254].into(), 80),
        ([224, 0, 0, 1].into(), 80),
        (std::net::Ipv6Addr::LOCALHOST.into(), PORT),
        (std::net::Ipv6Addr::UNSPECIFIED.into(), PORT),
        ("::ffff:127.0.0.1".parse()?, PORT),
    ]
    .map(SocketAddr::from)
    .to_vec();
    let daemon_ports = [15001, 15006, 15008].map(|port| SocketAddr::from((target, port)));
    fixture.attack_in_tunnel(&["authority_not_this_pod"], async |tunnel| {
        for to in &foreign {
            let result = tunnel.connect(&to.to_string()).await?;
            ensure!(
                result == ConnectResult::Status(400),
                "CONNECT {to}: {result:?}"
            );
        }
        // The tunnel stays usable.
        let result = tunnel
            .connect(&SocketAddr::from((target, PORT)).to_string())
            .await?;
        ensure!(
            result == ConnectResult::Status(200),
            "CONNECT to the pod: {result:?}"
        );
        Ok(())
    })?;
    fixture.attack_in_tunnel(&["self_call"], async |tunnel| {
        for to in daemon_ports {
            let result = tunnel.connect(&to.to_string()).await?;
            ensure!(
                result == ConnectResult::Status(400),
                "CONNECT {to}: {result:?}"
            );
        }
        Ok(())
    })?;
    for name in [
        "localhost",
        "web",
        "localhost.localdomain",
        "other.shop.svc.cluster.local",
    ] {
        fixture.attack_in_tunnel(&["authority_not_this_pod"], async |tunnel| {
            let result = tunnel.connect(&format!("{name}:{PORT}")).await?;
            ensure!(
                matches!(result, ConnectResult::Status(400 | 404 | 503)),
                "CONNECT {name}: {result:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn connections_to_the_daemons_own_listeners_are_refused_without_a_loop() -> Result<()> {
    let fixture = AttackFixture::up()?;
    let lab = &fixture.lab;
    let monitor = DaemonMonitor::start(lab, "a")?;
    let own = [
        lab.pod_ip("member", IpFamily::V4)?,
        lab.pod_ip("member", IpFamily::V6)?,
    ];
    let loopback: [IpAddr; 2] = [[127, 0, 0, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()];
    let member = Location::pod("member");
    for ip in own.into_iter().chain(loopback) {
        for port in [15001, 15006] {
            let url = format!("http://{}/[1-5]", SocketAddr::new(ip, port));
            let output = lab.exec_in(
                &member,
                &["curl", "-sS", "-m", "5", &url],
                Duration::from_secs(30),
            )?;
            ensure!(
                !output.success() && output.stdout.is_empty(),
                "{url} was answered: {}",
                output.stdout
            );
            ensure!(
                !output.stderr.contains("timed out"),
                "{url} timed out instead of being refused: {}",
                output.stderr
            );
        }
    }
    monitor.wait_failure("self_call")?;
    monitor.check_bounded(64 * 1024 * 1024, 16)?;

    // From another pod, outside and inside the mesh.
    let monitor = DaemonMonitor::start(lab, "b")?;
    for from in ["outsider", "member"] {
        for port in [15001, 15006, 15008] {
            let url = format!("http://{}/", SocketAddr::new(fixture.target, port));
            let output = lab.exec(from, &["curl", "-sS", "-m", "5", &url])?;
            ensure!(
                !output.success() && output.stdout.is_empty(),
                "{url} was answered: {}",
                output.stdout
            );
        }
    }
    monitor.wait_failure("self_call")?;
    monitor.check_bounded(64 * 1024 * 1024, 16)
}
