//! What members of the mesh can do to a daemon with HTTP/2 in a tunnel that they may open: nothing that others notice.

use std::net::SocketAddr;
use std::time::Duration;

use ambit_e2e::capture::ECHO;
use ambit_e2e::hostile::{
    Answer, Arena, Hello, Kind, MEMBER, Origin, PREFACE, STALL, TALK, Tunnel, connect, frame,
    headers, literal, reset,
};
use ambit_e2e::programs::PORT;
use ambit_e2e::tcp_load::Echo;
use anyhow::{Context, Result, ensure};
use tokio::io::AsyncWriteExt;

/// END_HEADERS
const END_HEADERS: u8 = 0x4;

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
    // A stream that is open when its tunnel is cut off says so.
    let cut = "tunnel_closed";
    for (name, value, reason) in [
        (
            "baggage",
            "k8s.namespace.name=\"\n\",,,=,a=b=c",
            "h2_protocol_error",
        ),
        ("baggage", big.as_str(), cut),
        (
            "forwarded",
            "for=127.0.0.1;host=\"a\tb\"\t\t reason=ok",
            cut,
        ),
        ("forwarded", big.as_str(), cut),
        ("traceparent", "00-zz", cut),
        ("x-forwarded-network", "other", cut),
    ] {
        arena.attack_in_tunnel(reason, async |tunnel| {
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
        ("small", &field[..1], 500_000),
        ("empty", &[], 500_000),
    ] {
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
    arena.attack_in_tunnel("h2_protocol_error", async |tunnel| {
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
    // One process for all connections: what a flood costs is the daemon's, not that of a program for each.
    let server = Echo::start(&arena.lab, "web")?;
    let echo = SocketAddr::new(arena.target, server.port()).to_string();
    // Streams without end, none closed.
    arena.attack_in_tunnel("h2_protocol_error", async |tunnel| {
        let streams = (0..STREAMS).map(|at| connect(2 * at + 1, &echo));
        tunnel
            .flood(streams, Duration::from_secs(30))
            .await
            .map(drop)
    })?;
    // CVE-2023-44487: each stream is reset as soon as it is opened.
    arena.attack_in_tunnel("too_many_streams", async |tunnel| {
        let pair = |at: u32| [connect(2 * at + 1, &echo), reset(2 * at + 1)].concat();
        tunnel
            .flood((0..STREAMS).map(pair), Duration::from_secs(30))
            .await
            .map(drop)
    })?;
    // CVE-2025-8671: requests that make the server reset them.
    arena.attack_in_tunnel("h2_protocol_error", async |tunnel| {
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
    // No stream was ever opened, so no connection has failed, and nothing is told.
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
        arena.attack_in_tunnel("tunnel_closed", async |tunnel| {
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
    arena.attack_in_tunnel("h2_protocol_error", async |tunnel| {
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
    let (member, reason) = (arena.member.clone(), "tunnel_closed");
    arena.attack_from(&member, reason, &async |origin: &Origin, to| {
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
