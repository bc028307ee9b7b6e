//! Members of the mesh that attack a daemon with HTTP/2 inside a valid tunnel: the daemon ends the stream or the tunnel
//! with a reason, and no other client is affected.

use std::net::SocketAddr;
use std::time::Duration;

use ambit_e2e::capture::ECHO_PORT;
use ambit_e2e::hostile::{
    AttackFixture, ConnectResult, FrameType, NON_READING_PORT, connect, frame, headers,
};
use ambit_e2e::programs::PORT;
use anyhow::{Context, Result, ensure};

/// END_HEADERS
const END_HEADERS: u8 = 0x4;

#[test]
fn malformed_connect_is_refused_and_the_tunnel_stays_usable() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let authority = SocketAddr::new(fixture.target, PORT).to_string();
    let long = format!("{}:80", "a".repeat(5000));
    let get = [
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", &authority),
        (":path", "/"),
    ];
    let with_path = [
        (":method", "CONNECT"),
        (":authority", &authority),
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
    fixture.attack_in_tunnel(&["connect_malformed"], async |tunnel| {
        for request in &requests {
            let stream = tunnel.next_stream_id();
            let result = tunnel
                .request(stream, &headers(stream, request, false))
                .await?;
            let refused = matches!(
                result,
                ConnectResult::Status(400 | 404 | 405 | 503) | ConnectResult::Reset(_)
            );
            ensure!(refused, "{request:?}: {result:?}");
        }
        let result = tunnel.connect(&authority).await?;
        ensure!(
            result == ConnectResult::Status(200),
            "a valid request after the malformed ones: {result:?}"
        );
        Ok(())
    })
}

#[test]
fn forged_headers_do_not_reach_the_log() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let authority = SocketAddr::new(fixture.target, PORT).to_string();
    let big = "x".repeat(30_000);
    // An accepted stream ends with this reason when its tunnel is closed.
    let accepted = "tunnel_closed";
    for (name, value, reason) in [
        (
            "baggage",
            "k8s.namespace.name=\"\n\",,,=,a=b=c",
            "h2_protocol_error",
        ),
        ("baggage", big.as_str(), accepted),
        (
            "forwarded",
            "for=127.0.0.1;host=\"a\tb\"\t\t reason=ok",
            accepted,
        ),
        ("forwarded", big.as_str(), accepted),
        ("traceparent", "00-zz", accepted),
        ("x-forwarded-network", "other", accepted),
    ] {
        fixture.attack_in_tunnel(&[reason], async |tunnel| {
            let stream = tunnel.next_stream_id();
            let request = [
                (":method", "CONNECT"),
                (":authority", &authority),
                (name, value),
            ];
            let result = tunnel
                .request(stream, &headers(stream, &request, false))
                .await?;
            ensure!(
                matches!(
                    result,
                    ConnectResult::Status(200 | 400 | 431)
                        | ConnectResult::Reset(_)
                        | ConnectResult::GoAway(1)
                ),
                "{name}: {result:?}"
            );
            Ok(())
        })?;
    }
    let log = fixture.lab.daemon_log("b")?;
    let forged = log
        .lines()
        .find(|line| line.contains("\t\t reason=ok") || line.starts_with("\","));
    ensure!(
        forged.is_none(),
        "a peer's header has forged a log line: {forged:?}"
    );
    Ok(())
}

#[test]
fn invalid_frames_end_the_tunnel_as_protocol_error() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    for (what, bytes) in [
        ("DATA on stream 0", frame(FrameType::Data, 0, 0, b"x")),
        (
            "DATA of an idle stream",
            frame(FrameType::Data, 0, 99, b"x"),
        ),
        (
            "a frame of 16 MiB",
            [&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1][..], &[0; 100_000]].concat(),
        ),
        ("an even stream", connect(2, "10.0.0.1:80")),
        (
            "a window beyond 2^31",
            frame(
                FrameType::WindowUpdate,
                0,
                0,
                &0x7fff_ffff_u32.to_be_bytes(),
            )
            .repeat(2),
        ),
        (
            "a header block that is not HPACK",
            frame(FrameType::Headers, END_HEADERS, 1, &[0xff; 64]),
        ),
        (
            "CONTINUATION without HEADERS",
            frame(FrameType::Continuation, END_HEADERS, 1, &[0x88]),
        ),
        (
            "SETTINGS of odd length",
            frame(FrameType::Settings, 0, 0, &[0; 5]),
        ),
    ] {
        fixture
            .attack_in_tunnel(&["h2_protocol_error"], async |tunnel| {
                let end = tunnel.request(1, &bytes).await?;
                ensure!(
                    matches!(end, ConnectResult::GoAway(_) | ConnectResult::Closed),
                    "{end:?}"
                );
                Ok(())
            })
            .with_context(|| what.to_owned())?;
    }
    Ok(())
}

#[test]
fn non_reading_application_stalls_no_other_stream_of_the_tunnel() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let target = fixture.target;
    let authority = |port| SocketAddr::new(target, port).to_string();
    for size in [1, 64, 1000] {
        fixture.attack_in_tunnel(&["tunnel_closed"], async |tunnel| {
            let stalled = tunnel.next_stream_id();
            let result = tunnel
                .request(stalled, &connect(stalled, &authority(NON_READING_PORT)))
                .await?;
            ensure!(result == ConnectResult::Status(200), "{result:?}");
            // At most the stream's initial window, which the daemon must accept.
            let data = frame(FrameType::Data, 0, stalled, &vec![b'x'; size]);
            let frames =
                std::iter::repeat_n(data.repeat(100), 500.min(1_000_000 / size / 100).max(1));
            let end = tunnel.flood(frames, Duration::from_secs(20)).await?;
            ensure!(end.is_none(), "the daemon ended the tunnel: {end:?}");
            let echo = tunnel.next_stream_id();
            let result = tunnel
                .request(echo, &connect(echo, &authority(ECHO_PORT)))
                .await?;
            ensure!(
                result == ConnectResult::Status(200),
                "a second stream: {result:?}"
            );
            for _ in 0..10 {
                tunnel
                    .send(&frame(FrameType::Data, 0, echo, b"hello"))
                    .await?;
                let back = tunnel.read_data(echo, 5).await?;
                ensure!(back == b"hello", "{back:?}");
            }
            Ok(())
        })?;
    }
    Ok(())
}
