//! Floods of HTTP/2 frames inside a valid tunnel: the daemon ends the stream or the tunnel with a reason, its memory stays
//! bounded, and no other client is affected.

use std::net::SocketAddr;
use std::time::Duration;

use ambit_e2e::hostile::{
    AttackFixture, ConnectResult, FrameType, MEMBER_IDENTITY, NON_READING_PORT, Netns, PREFACE,
    TlsClient, Tunnel, WRITING_PORT, connect, frame, literal, rst_stream,
};
use ambit_e2e::tcp_load::EchoServer;
use anyhow::{Context, Result, ensure};
use tokio::io::AsyncWriteExt;

/// END_HEADERS
const END_HEADERS: u8 = 0x4;

/// More streams than any limit allows.
const FLOOD_STREAMS: u32 = 20_000;

/// Streams of one write. Even one TLS record then carries more streams than the 200 that the daemon serves at a time.
const STREAMS_PER_WRITE: u32 = 1000;

/// How long a flood may take until the daemon has read or refused it.
const FLOOD_DEADLINE: Duration = Duration::from_secs(30);

/// The frames of [`FLOOD_STREAMS`] streams, in writes of [`STREAMS_PER_WRITE`].
fn stream_flood(frames: impl Fn(u32) -> Vec<u8>) -> impl Iterator<Item = Vec<u8>> {
    let ids = |first: u32| (first..first + STREAMS_PER_WRITE).map(|index| 2 * index + 1);
    (0..FLOOD_STREAMS)
        .step_by(STREAMS_PER_WRITE as usize)
        .map(move |first| ids(first).flat_map(&frames).collect())
}

#[test]
fn stream_floods_are_refused() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    // One process serves all connections, so the flood's cost is the daemon's.
    let server = EchoServer::start(&fixture.lab, "web")?;
    let echo = SocketAddr::new(fixture.target, server.port()).to_string();
    // Streams that are never closed.
    fixture.attack_in_tunnel(&["h2_protocol_error"], async |tunnel| {
        let streams = stream_flood(|id| connect(id, &echo));
        tunnel.flood(streams, FLOOD_DEADLINE).await.map(drop)
    })?;
    // CVE-2023-44487: each stream is reset as soon as it is opened. Two limits apply, and scheduling decides which is
    // reached first. The daemon refuses streams (too_many_streams) while 200 earlier ones are still being served. h2
    // ends the tunnel (h2_protocol_error) once 1024 streams are reset before the daemon has accepted them.
    let reasons = ["too_many_streams", "h2_protocol_error"];
    fixture.attack_in_tunnel(&reasons, async |tunnel| {
        let streams = stream_flood(|id| [connect(id, &echo), rst_stream(id)].concat());
        tunnel.flood(streams, FLOOD_DEADLINE).await.map(drop)
    })?;
    // CVE-2025-8671: each request makes the server reset its stream.
    fixture.attack_in_tunnel(&["h2_protocol_error"], async |tunnel| {
        let invalid = |id| frame(FrameType::WindowUpdate, 0, id, &[0; 4]);
        let streams = stream_flood(|id| [connect(id, &echo), invalid(id)].concat());
        tunnel.flood(streams, FLOOD_DEADLINE).await.map(drop)
    })
}

#[test]
fn endless_header_blocks_end_the_tunnel() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let start = |tunnel: &mut Tunnel| {
        let stream = tunnel.next_stream_id();
        let block = [
            literal(":method", "CONNECT"),
            literal(":authority", "10.0.0.1:80"),
        ]
        .concat();
        (stream, frame(FrameType::Headers, 0, stream, &block))
    };
    let field = literal("x", &"y".repeat(16_000));
    for (what, payload, count) in [
        ("huge", &field[..], 5_000),
        ("small", &field[..1], 500_000),
        ("empty", &[], 500_000),
    ] {
        fixture
            .attack_in_tunnel(&["h2_protocol_error"], async |tunnel| {
                let (stream, first) = start(tunnel);
                let more =
                    std::iter::repeat_n(frame(FrameType::Continuation, 0, stream, payload), count);
                let end = tunnel
                    .flood(std::iter::once(first).chain(more), Duration::from_secs(20))
                    .await?;
                ensure!(end.is_some(), "the daemon read all of it");
                Ok(())
            })
            .with_context(|| format!("{what} CONTINUATION frames"))?;
    }
    // A header block that ends, far over the limit: the stream or the connection is refused.
    fixture.attack_in_tunnel(&["h2_protocol_error"], async |tunnel| {
        let (stream, first) = start(tunnel);
        let block = literal("x", &"y".repeat(16_000));
        let mut bytes = first;
        for _ in 0..10 {
            bytes.extend(frame(FrameType::Continuation, 0, stream, &block));
        }
        bytes.extend(frame(FrameType::Continuation, END_HEADERS, stream, &block));
        let result = tunnel.request(stream, &bytes).await?;
        ensure!(
            !matches!(result, ConnectResult::Status(200)),
            "160 KB of headers were accepted: {result:?}"
        );
        Ok(())
    })
}

#[test]
fn control_frame_floods_are_bounded_when_replies_are_not_read() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let leaf = fixture.ca.leaf(&[MEMBER_IDENTITY])?;
    let floods = [
        frame(FrameType::Ping, 0, 0, &[7; 8]),
        frame(FrameType::Settings, 0, 0, &[]),
    ];
    // No stream is opened, so no connection fails and nothing is logged.
    for bytes in floods.map(|bytes| bytes.repeat(1000)) {
        fixture.attack_from(&fixture.member.clone(), &[], &async |netns: &Netns, to| {
            let mut stream = TlsClient::with_certificate(&leaf)
                .handshake(netns, to)
                .await?;
            stream.write_all(PREFACE).await?;
            stream
                .write_all(&frame(FrameType::Settings, 0, 0, &[]))
                .await?;
            let flood = async {
                for _ in 0..1000 {
                    if stream.write_all(&bytes).await.is_err() {
                        break;
                    }
                }
            };
            // The daemon may stop reading, because its replies are not read.
            let _ = tokio::time::timeout(Duration::from_secs(3), flood).await;
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn endless_empty_data_frames_end_the_tunnel() -> Result<()> {
    let mut fixture = AttackFixture::up()?;
    let stall = SocketAddr::new(fixture.target, NON_READING_PORT).to_string();
    fixture.attack_in_tunnel(&["h2_protocol_error"], async |tunnel| {
        let stream = tunnel.next_stream_id();
        let result = tunnel.request(stream, &connect(stream, &stall)).await?;
        ensure!(result == ConnectResult::Status(200), "{result:?}");
        let frames = std::iter::repeat_n(frame(FrameType::Data, 0, stream, &[]).repeat(1000), 1000);
        tunnel
            .flood(frames, Duration::from_secs(30))
            .await
            .map(drop)
    })
}

#[test]
fn non_reading_peers_use_bounded_memory() -> Result<()> {
    /// The stream limit of one tunnel.
    const STREAMS: u32 = 100;
    let mut fixture = AttackFixture::up()?;
    let leaf = fixture.ca.leaf(&[MEMBER_IDENTITY])?;
    let talk = SocketAddr::new(fixture.target, WRITING_PORT).to_string();
    // The largest windows, and a socket that is never read.
    let member = fixture.member.clone();
    fixture.attack_from(&member, &["tunnel_closed"], &async |netns: &Netns, to| {
        let mut tunnels = Vec::new();
        for _ in 0..3 {
            let mut tunnel =
                Tunnel::open(&TlsClient::with_certificate(&leaf), netns, to, 0x7fff_ffff).await?;
            let open: Vec<u8> = (0..STREAMS)
                .flat_map(|at| connect(2 * at + 1, &talk))
                .collect();
            tunnel.send(&open).await?;
            tunnel
                .send(&frame(
                    FrameType::WindowUpdate,
                    0,
                    0,
                    &0x7000_0000_u32.to_be_bytes(),
                ))
                .await?;
            tunnels.push(tunnel);
        }
        // The first stream of each tunnel is served meanwhile.
        for tunnel in &mut tunnels {
            tunnel.read_data(1, 1).await?;
        }
        Ok(())
    })
}
