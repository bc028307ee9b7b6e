//! What a mesh daemon does with clients that mean harm: it refuses with a reason that says what was wrong, goes on as the
//! same process within its memory, and nobody else notices.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use ambit_e2e::hostile::{
    Answer, Arena, Authority, H2, Hello, Leaf, MEMBER, Origin, PREFACE, TLS13, Tunnel, WINDOW,
    Watch,
};
use ambit_e2e::programs::PORT;
use anyhow::{Context, Result, ensure};
use lab::{IpFamily, Location};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Reads until the peer ends the connection, in whichever way.
async fn until_end(stream: &mut (impl AsyncReadExt + Unpin)) {
    let mut buffer = [0; 4096];
    while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}

/// Sends what is not TLS, and waits for the end.
async fn say(origin: &Origin, to: SocketAddr, bytes: &[u8]) -> Result<()> {
    let mut stream = origin.connect(to).await?;
    // The daemon may have ended it before all of it was taken.
    let _ = stream.write_all(bytes).await;
    until_end(&mut stream).await;
    Ok(())
}

/// Shakes hands with this certificate, which must not lead to an answered request.
async fn refused(origin: &Origin, to: SocketAddr, leaf: &Leaf) -> Result<()> {
    let Ok(mut tunnel) = Tunnel::open(&Hello::of(leaf), origin, to, WINDOW).await else {
        return Ok(());
    };
    let answer = tunnel
        .connect(&SocketAddr::new(to.ip(), PORT).to_string())
        .await?;
    ensure!(answer == Answer::Closed, "it was answered: {answer:?}");
    Ok(())
}

#[test]
fn what_is_not_hbone_is_refused_and_named_so() -> Result<()> {
    let mut arena = Arena::up()?;
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
        arena.attack("peer_not_hbone", async |origin, to| {
            say(origin, to, bytes).await
        })?;
    }
    let leaf = arena.authority.leaf(&[MEMBER])?;
    let tls12 = Hello {
        versions: &[&rustls::version::TLS12],
        ..Hello::of(&leaf)
    };
    arena.attack("peer_not_hbone", async |origin, to| {
        ensure!(
            tls12.handshake(origin, to).await.is_err(),
            "TLS 1.2 was accepted"
        );
        Ok(())
    })?;
    for alpn in [&[&b"http/1.1"[..]][..], &[]] {
        let hello = Hello {
            alpn,
            ..Hello::of(&leaf)
        };
        arena.attack("peer_not_hbone", async |origin, to| {
            if let Ok(mut stream) = hello.handshake(origin, to).await {
                let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
                until_end(&mut stream).await;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What a program of everyday does to the HBONE port `$0`, a word that it must say of its end, and the daemon's
/// reason for it.
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
fn programs_that_are_not_a_mesh_get_an_end_and_no_answer() -> Result<()> {
    let mut arena = Arena::up()?;
    let (to, from) = (
        arena.hbone().to_string(),
        arena.lab.pod_ip("stranger", IpFamily::V4)?,
    );
    for (program, complaint, reason) in PROGRAMS {
        let watch = Watch::start(&arena.lab, "b")?;
        let command = ["sh", "-c", program, &to];
        let place = Location::pod("stranger");
        let output = arena
            .lab
            .exec_in(&place, &command, Duration::from_secs(30))
            .with_context(|| format!("{program} was not ended"))?;
        let said = &output.stderr;
        ensure!(
            said.contains(complaint) && !said.contains("timed out"),
            "{program} said {said}"
        );
        ensure!(
            complaint.is_empty() || !output.success(),
            "{program} has succeeded"
        );
        ensure!(
            !output.stdout.contains("HTTP/"),
            "{program} was answered: {}",
            output.stdout
        );
        watch
            .explained_of(reason, from)
            .with_context(|| program.to_owned())?;
    }
    arena.neighbour()
}

#[test]
fn a_certificate_that_is_not_of_the_mesh_is_refused() -> Result<()> {
    let mut arena = Arena::up()?;
    let nobody = Hello {
        certificate: None,
        alpn: H2,
        versions: TLS13,
    };
    arena.attack("peer_without_certificate", async |origin, to| {
        if let Ok(mut stream) = nobody.handshake(origin, to).await {
            until_end(&mut stream).await;
        }
        Ok(())
    })?;
    let now = SystemTime::now();
    let (hour, past) = (Duration::from_secs(3600), now - Duration::from_secs(7200));
    let second = "spiffe://cluster.local/ns/shop/sa/web";
    for (what, leaf) in [
        ("of another root", Authority::foreign()?.leaf(&[MEMBER])?),
        (
            "expired",
            arena.authority.leaf_valid(&[MEMBER], past, past + hour)?,
        ),
        (
            "not yet valid",
            arena
                .authority
                .leaf_valid(&[MEMBER], now + hour, now + 2 * hour)?,
        ),
        ("without a name", arena.authority.leaf(&[])?),
        (
            "with another kind of URI",
            arena
                .authority
                .leaf(&["https://cluster.local/ns/shop/sa/member"])?,
        ),
        (
            "with a malformed SPIFFE id",
            arena
                .authority
                .leaf(&["spiffe://cluster.local/ns//sa/%2e"])?,
        ),
        ("with two names", arena.authority.leaf(&[MEMBER, second])?),
    ] {
        arena
            .attack("peer_untrusted", async |origin, to| {
                refused(origin, to, &leaf).await
            })
            .with_context(|| format!("a certificate {what}"))?;
    }
    Ok(())
}

#[test]
fn a_handshake_that_stalls_ends_at_its_deadline() -> Result<()> {
    /// Together more than a backlog, and less than a pod may have open.
    const EACH: usize = 100;
    let mut arena = Arena::up()?;
    let leaf = arena.authority.leaf(&[MEMBER])?;
    arena.attack("tls_handshake_timeout", async |origin, to| {
        let mut stalled = Vec::new();
        for _ in 0..EACH {
            // Says nothing at all.
            stalled.push(origin.connect(to).await?);
            // The start of a ClientHello: a record of 512 bytes, of which 6 are there.
            let mut half = origin.connect(to).await?;
            half.write_all(&[0x16, 3, 1, 2, 0, 1]).await?;
            stalled.push(half);
        }
        // A byte every half second keeps a socket busy, but not the handshake from its deadline.
        let mut slow = origin.connect(to).await?;
        slow.write_all(&[0x16, 3, 1, 2, 0]).await?;
        let (mut read, mut write) = slow.split();
        let drip = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(500));
            while write.write_all(&[0]).await.is_ok() {
                ticks.tick().await;
            }
        };
        tokio::select! {
            () = until_end(&mut read) => {}
            () = drip => {}
        }
        for stream in &mut stalled {
            until_end(stream).await;
        }
        Ok(())
    })?;
    arena.attack_from(
        &arena.member.clone(),
        "h2_handshake_timeout",
        &async |origin: &Origin, to| {
            let mut stream = Hello::of(&leaf).handshake(origin, to).await?;
            until_end(&mut stream).await;
            Ok(())
        },
    )
}

#[test]
fn a_member_reaches_nothing_but_the_pod_that_it_has_dialled() -> Result<()> {
    let mut arena = Arena::up()?;
    let lab = &arena.lab;
    let other = lab.pod_ip("other", IpFamily::V4)?;
    let node: IpAddr = lab.node_ip("b", IpFamily::V4)?;
    let target = arena.target;
    let v6 = lab.pod_ip("web", IpFamily::V6)?;
    let outside: Vec<SocketAddr> = [
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
    let own = [15001, 15006, 15008].map(|port| SocketAddr::from((target, port)));
    arena.attack_in_tunnel("authority_not_this_pod", async |tunnel| {
        for to in &outside {
            let answer = tunnel.connect(&to.to_string()).await?;
            ensure!(answer == Answer::Status(400), "CONNECT {to}: {answer:?}");
        }
        // The tunnel itself is still good.
        let answer = tunnel
            .connect(&SocketAddr::from((target, PORT)).to_string())
            .await?;
        ensure!(
            answer == Answer::Status(200),
            "CONNECT to the pod: {answer:?}"
        );
        Ok(())
    })?;
    arena.attack_in_tunnel("self_call", async |tunnel| {
        for to in own {
            let answer = tunnel.connect(&to.to_string()).await?;
            ensure!(answer == Answer::Status(400), "CONNECT {to}: {answer:?}");
        }
        Ok(())
    })?;
    for name in [
        "localhost",
        "web",
        "localhost.localdomain",
        "other.shop.svc.cluster.local",
    ] {
        arena.attack_in_tunnel("authority_not_this_pod", async |tunnel| {
            let answer = tunnel.connect(&format!("{name}:{PORT}")).await?;
            ensure!(
                matches!(answer, Answer::Status(400 | 404 | 503)),
                "CONNECT {name}: {answer:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_pod_that_calls_its_own_listeners_is_refused_and_nothing_loops() -> Result<()> {
    let arena = Arena::up()?;
    let lab = &arena.lab;
    let watch = Watch::start(lab, "a")?;
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
                "{url} was not refused: {}",
                output.stderr
            );
        }
    }
    watch.explained("self_call")?;
    watch.unharmed(64 * 1024 * 1024, 16)?;

    // From another pod, in clear and through the mesh.
    let watch = Watch::start(lab, "b")?;
    for from in ["stranger", "member"] {
        for port in [15001, 15006, 15008] {
            let url = format!("http://{}/", SocketAddr::new(arena.target, port));
            let output = lab.exec(from, &["curl", "-sS", "-m", "5", &url])?;
            ensure!(
                !output.success() && output.stdout.is_empty(),
                "{url} was answered: {}",
                output.stdout
            );
        }
    }
    watch.explained("self_call")?;
    watch.unharmed(64 * 1024 * 1024, 16)
}
