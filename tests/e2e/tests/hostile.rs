//! What a mesh daemon does with peers that mean harm: it refuses with a reason that says what was wrong, goes on as the
//! same process within its memory, and nobody else notices.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use ambit_e2e::capture::ECHO;
use ambit_e2e::hostile::{
    Answer, Arena, Authority, H2, Hello, Kind, Leaf, MEMBER, Origin, PREFACE, STALL, TALK, TLS13,
    Tunnel, WINDOW, Watch, connect, frame, headers, literal, reset,
};
use ambit_e2e::programs::PORT;
use anyhow::{Context, Result, ensure};
use lab::{Family, Where};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// END_HEADERS
const END_HEADERS: u8 = 0x4;

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

#[test]
fn programs_that_are_not_a_mesh_get_an_end_and_no_answer() -> Result<()> {
    let mut arena = Arena::up()?;
    let to = arena.hbone().to_string();
    let script = format!(
        "! curl -sS -m 5 http://{to}/ && ! curl -sSk -m 5 https://{to}/ && \
         ! openssl s_client -connect {to} -tls1_2 </dev/null && \
         echo hello | socat -t5 - TCP:{to} && head -c 100000 /dev/urandom | socat -t5 - TCP:{to}; true"
    );
    let watch = Watch::start(&arena.lab, "b")?;
    let output = arena.lab.exec("stranger", &["sh", "-c", &script])?;
    ensure!(
        !output.stdout.contains("HTTP/"),
        "an answer: {}",
        output.stdout
    );
    watch.explained("peer_not_hbone")?;
    watch.explained("peer_without_certificate")?;
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
    let other = lab.pod_ip("other", Family::V4)?;
    let node: IpAddr = lab.node_ip("b", Family::V4)?;
    let target = arena.target;
    let v6 = lab.pod_ip("web", Family::V6)?;
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
        arena.attack_in_tunnel("", async |tunnel| {
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
fn a_request_that_is_no_connect_is_refused_and_the_tunnel_lives_on() -> Result<()> {
    let mut arena = Arena::up()?;
    let good = SocketAddr::new(arena.target, PORT).to_string();
    let long = format!("{}:80", "a".repeat(5000));
    let get = [
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", &good),
        (":path", "/"),
    ];
    let with_path = [
        (":method", "CONNECT"),
        (":authority", &good),
        (":scheme", "https"),
        (":path", "/"),
    ];
    let requests: Vec<Vec<(&str, &str)>> = [
        get.to_vec(),
        with_path.to_vec(),
        vec![(":method", "CONNECT")],
    ]
    .into_iter()
    .chain(
        [
            "",
            ":",
            ":80",
            "10.0.0.1",
            "10.0.0.1:0",
            "10.0.0.1:99999",
            "10.0.0.1:-1",
            "10.0.0.1: 80",
            "a b:80",
            "[::1:80",
            "[::1]",
            "::1:80",
            "user@10.0.0.1:80",
            "10.0.0.1:80/",
            "http://10.0.0.1:80",
            "10.0.0.1:80:80",
            "010.0.0.1:80",
            "0x0a.1:80",
            "%31:80",
            "\u{430}:80",
            &long,
        ]
        .map(|authority| vec![(":method", "CONNECT"), (":authority", authority)]),
    )
    .collect();
    arena.attack_in_tunnel("connect_malformed", async |tunnel| {
        for request in &requests {
            let stream = tunnel.stream();
            let answer = tunnel.ask(stream, &headers(stream, request, false)).await?;
            let refused = matches!(
                answer,
                Answer::Status(400 | 404 | 405 | 503) | Answer::Reset(_)
            );
            ensure!(refused, "{request:?}: {answer:?}");
        }
        let answer = tunnel.connect(&good).await?;
        ensure!(
            answer == Answer::Status(200),
            "a good request after the bad ones: {answer:?}"
        );
        Ok(())
    })
}

#[test]
fn headers_of_our_own_making_change_nothing_for_others() -> Result<()> {
    let mut arena = Arena::up()?;
    let good = SocketAddr::new(arena.target, PORT).to_string();
    let big = "x".repeat(30_000);
    for (name, value) in [
        ("baggage", "k8s.namespace.name=\"\n\",,,=,a=b=c"),
        ("baggage", big.as_str()),
        ("forwarded", "for=127.0.0.1;host=\"a\tb\"\t\t reason=ok"),
        ("forwarded", big.as_str()),
        ("traceparent", "00-zz"),
        ("x-forwarded-network", "other"),
    ] {
        arena.attack_in_tunnel("", async |tunnel| {
            let stream = tunnel.stream();
            let request = [(":method", "CONNECT"), (":authority", &good), (name, value)];
            let answer = tunnel
                .ask(stream, &headers(stream, &request, false))
                .await?;
            ensure!(
                matches!(
                    answer,
                    Answer::Status(200 | 400 | 431) | Answer::Reset(_) | Answer::GoAway(1)
                ),
                "{name}: {answer:?}"
            );
            Ok(())
        })?;
    }
    let log = arena.lab.daemon_log("b")?;
    let forged = log
        .lines()
        .find(|line| line.contains("\t\t reason=ok") || line.starts_with("\","));
    ensure!(
        forged.is_none(),
        "a header of a peer has forged a line of the log: {forged:?}"
    );
    Ok(())
}

#[test]
fn headers_without_end_cost_the_tunnel_and_nothing_else() -> Result<()> {
    let mut arena = Arena::up()?;
    let start = |tunnel: &mut Tunnel| {
        let stream = tunnel.stream();
        let block = [
            literal(":method", "CONNECT"),
            literal(":authority", "10.0.0.1:80"),
        ]
        .concat();
        (stream, frame(Kind::Headers, 0, stream, &block))
    };
    let field = literal("x", &"y".repeat(16_000));
    for (what, payload, count) in [
        ("huge", &field[..], 5_000),
        ("small", &field[..1], 0),
        ("empty", &[], 500_000),
    ] {
        if count == 0 {
            continue;
        }
        arena
            .attack_in_tunnel("h2_protocol_error", async |tunnel| {
                let (stream, first) = start(tunnel);
                let more =
                    std::iter::repeat_n(frame(Kind::Continuation, 0, stream, payload), count);
                let end = tunnel
                    .flood(std::iter::once(first).chain(more), Duration::from_secs(20))
                    .await?;
                ensure!(end.is_some(), "all of it was taken");
                Ok(())
            })
            .with_context(|| format!("{what} CONTINUATION frames"))?;
    }
    // One that ends, but is far over the limit: the stream is refused, or the connection.
    arena.attack_in_tunnel("", async |tunnel| {
        let (stream, first) = start(tunnel);
        let block = literal("x", &"y".repeat(16_000));
        let mut bytes = first;
        for _ in 0..10 {
            bytes.extend(frame(Kind::Continuation, 0, stream, &block));
        }
        bytes.extend(frame(Kind::Continuation, END_HEADERS, stream, &block));
        let answer = tunnel.ask(stream, &bytes).await?;
        ensure!(
            !matches!(answer, Answer::Status(200)),
            "160 KB of headers were taken: {answer:?}"
        );
        Ok(())
    })
}

#[test]
fn frames_that_http2_forbids_end_the_tunnel_with_a_reason() -> Result<()> {
    let mut arena = Arena::up()?;
    for (what, bytes) in [
        ("DATA on stream 0", frame(Kind::Data, 0, 0, b"x")),
        ("DATA of an idle stream", frame(Kind::Data, 0, 99, b"x")),
        (
            "a frame of 16 MiB",
            [&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1][..], &[0; 100_000]].concat(),
        ),
        ("an even stream", connect(2, "10.0.0.1:80")),
        (
            "a window beyond 2^31",
            frame(Kind::WindowUpdate, 0, 0, &0x7fff_ffff_u32.to_be_bytes()).repeat(2),
        ),
        (
            "a header block that is no HPACK",
            frame(Kind::Headers, END_HEADERS, 1, &[0xff; 64]),
        ),
        (
            "CONTINUATION of nothing",
            frame(Kind::Continuation, END_HEADERS, 1, &[0x88]),
        ),
        (
            "SETTINGS of odd length",
            frame(Kind::Settings, 0, 0, &[0; 5]),
        ),
    ] {
        arena
            .attack_in_tunnel("h2_protocol_error", async |tunnel| {
                let end = tunnel.ask(1, &bytes).await?;
                ensure!(matches!(end, Answer::GoAway(_) | Answer::Closed), "{end:?}");
                Ok(())
            })
            .with_context(|| what.to_owned())?;
    }
    Ok(())
}

#[test]
fn floods_of_streams_and_resets_harm_nobody() -> Result<()> {
    /// Enough for any limit to be reached many times over.
    const STREAMS: u32 = 20_000;
    let mut arena = Arena::up()?;
    let echo = SocketAddr::new(arena.target, ECHO).to_string();
    // Streams without end, none closed.
    arena.attack_in_tunnel("", async |tunnel| {
        let streams = (0..STREAMS).map(|at| connect(2 * at + 1, &echo));
        tunnel
            .flood(streams, Duration::from_secs(30))
            .await
            .map(drop)
    })?;
    // CVE-2023-44487: each stream is reset as soon as it is opened.
    arena.attack_in_tunnel("", async |tunnel| {
        let pair = |at: u32| [connect(2 * at + 1, &echo), reset(2 * at + 1)].concat();
        tunnel
            .flood((0..STREAMS).map(pair), Duration::from_secs(30))
            .await
            .map(drop)
    })?;
    // CVE-2025-8671: requests that make the server reset them.
    arena.attack_in_tunnel("", async |tunnel| {
        let bad = |at: u32| {
            let stream = 2 * at + 1;
            [
                connect(stream, &echo),
                frame(Kind::WindowUpdate, 0, stream, &[0; 4]),
            ]
            .concat()
        };
        tunnel
            .flood((0..STREAMS).map(bad), Duration::from_secs(30))
            .await
            .map(drop)
    })
}

#[test]
fn floods_of_control_frames_whose_answers_nobody_reads_are_bounded() -> Result<()> {
    let mut arena = Arena::up()?;
    let leaf = arena.authority.leaf(&[MEMBER])?;
    let floods = [
        frame(Kind::Ping, 0, 0, &[7; 8]),
        frame(Kind::Settings, 0, 0, &[]),
    ];
    for bytes in floods.map(|bytes| bytes.repeat(1000)) {
        arena.attack_from(&arena.member.clone(), "", &async |origin: &Origin, to| {
            let mut stream = Hello::of(&leaf).handshake(origin, to).await?;
            stream.write_all(PREFACE).await?;
            stream.write_all(&frame(Kind::Settings, 0, 0, &[])).await?;
            let flood = async {
                for _ in 0..1000 {
                    if stream.write_all(&bytes).await.is_err() {
                        break;
                    }
                }
            };
            // A daemon that stops reading, because we do not, has done well.
            let _ = tokio::time::timeout(Duration::from_secs(3), flood).await;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn an_application_that_does_not_read_stalls_no_other_stream_of_its_tunnel() -> Result<()> {
    let mut arena = Arena::up()?;
    let target = arena.target;
    let at = |port| SocketAddr::new(target, port).to_string();
    for size in [1, 64, 1000] {
        arena.attack_in_tunnel("", async |tunnel| {
            let stalled = tunnel.stream();
            let answer = tunnel.ask(stalled, &connect(stalled, &at(STALL))).await?;
            ensure!(answer == Answer::Status(200), "{answer:?}");
            // Up to the stream's window; what the daemon allows beyond that is not ours to know.
            let data = frame(Kind::Data, 0, stalled, &vec![b'x'; size]);
            let frames =
                std::iter::repeat_n(data.repeat(100), 500.min(1_000_000 / size / 100).max(1));
            let end = tunnel.flood(frames, Duration::from_secs(20)).await?;
            ensure!(end.is_none(), "the tunnel was ended: {end:?}");
            let echo = tunnel.stream();
            let answer = tunnel.ask(echo, &connect(echo, &at(ECHO))).await?;
            ensure!(answer == Answer::Status(200), "a second stream: {answer:?}");
            for _ in 0..10 {
                tunnel.send(&frame(Kind::Data, 0, echo, b"hello")).await?;
                let back = tunnel.data(echo, 5).await?;
                ensure!(back == b"hello", "{back:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn empty_data_frames_without_end_are_bounded() -> Result<()> {
    let mut arena = Arena::up()?;
    let stall = SocketAddr::new(arena.target, STALL).to_string();
    arena.attack_in_tunnel("", async |tunnel| {
        let stream = tunnel.stream();
        let answer = tunnel.ask(stream, &connect(stream, &stall)).await?;
        ensure!(answer == Answer::Status(200), "{answer:?}");
        let frames = std::iter::repeat_n(frame(Kind::Data, 0, stream, &[]).repeat(1000), 1000);
        tunnel
            .flood(frames, Duration::from_secs(30))
            .await
            .map(drop)
    })
}

#[test]
fn peers_that_do_not_read_what_applications_say_are_bounded() -> Result<()> {
    /// As many as one tunnel may have.
    const STREAMS: u32 = 100;
    let mut arena = Arena::up()?;
    let leaf = arena.authority.leaf(&[MEMBER])?;
    let talk = SocketAddr::new(arena.target, TALK).to_string();
    // An open window, and a socket that is never read.
    arena.attack_from(&arena.member.clone(), "", &async |origin: &Origin, to| {
        let mut tunnels = Vec::new();
        for _ in 0..3 {
            let mut tunnel = Tunnel::open(&Hello::of(&leaf), origin, to, 0x7fff_ffff).await?;
            let open: Vec<u8> = (0..STREAMS)
                .flat_map(|at| connect(2 * at + 1, &talk))
                .collect();
            tunnel.send(&open).await?;
            tunnel
                .send(&frame(
                    Kind::WindowUpdate,
                    0,
                    0,
                    &0x7000_0000_u32.to_be_bytes(),
                ))
                .await?;
            tunnels.push(tunnel);
        }
        // The first of them is served like any other meanwhile.
        for tunnel in &mut tunnels {
            tunnel.data(1, 1).await?;
        }
        Ok(())
    })
}

#[test]
fn a_pod_that_calls_its_own_listeners_is_refused_and_nothing_loops() -> Result<()> {
    let arena = Arena::up()?;
    let lab = &arena.lab;
    let watch = Watch::start(lab, "a")?;
    let own = [
        lab.pod_ip("member", Family::V4)?,
        lab.pod_ip("member", Family::V6)?,
    ];
    let loopback: [IpAddr; 2] = [[127, 0, 0, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()];
    let member = Where::pod("member");
    for ip in own.into_iter().chain(loopback) {
        for port in [15001, 15006] {
            let url = format!("http://{}/[1-5]", SocketAddr::new(ip, port));
            let output = lab.exec_within(
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
