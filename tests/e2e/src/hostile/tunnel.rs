//! An HTTP/2 client connection that sends any bytes.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::frames::{END_STREAM, Frame, FrameType, connect, frame, settings, status};
use super::netns::Netns;
use super::tls::TlsClient;

/// The client connection preface, RFC 9113 section 3.4.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long the peer may take to respond.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);

/// Bytes of a frame before its payload.
const FRAME_HEADER_BYTES: usize = 9;

/// SETTINGS_HEADER_TABLE_SIZE
const HEADER_TABLE_SIZE: u16 = 1;
/// SETTINGS_INITIAL_WINDOW_SIZE
const INITIAL_WINDOW_SIZE: u16 = 4;

/// How the peer responded to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectResult {
    /// Response headers with this status.
    Status(u16),
    /// RST_STREAM with this HTTP/2 error code.
    Reset(u32),
    /// GOAWAY with this HTTP/2 error code.
    GoAway(u32),
    /// The connection ended, with or without a TLS alert, and without GOAWAY.
    Closed,
}

/// A TLS connection on which the HTTP/2 preface has been sent.
pub struct Tunnel {
    reader: Reader,
    writer: WriteHalf<TlsStream<TcpStream>>,
    next_stream_id: u32,
}

struct Reader {
    half: ReadHalf<TlsStream<TcpStream>>,
    buffer: Vec<u8>,
}

impl Tunnel {
    /// Completes the TLS handshake and sends preface and SETTINGS: no dynamic header table, so that responses can be
    /// decoded without one, and a receive window of `window` bytes per stream.
    ///
    /// # Errors
    /// The peer refuses the connection or the handshake.
    pub async fn open(
        client: &TlsClient<'_>,
        netns: &Netns,
        to: SocketAddr,
        window: u32,
    ) -> Result<Self> {
        let (read, mut writer) = tokio::io::split(client.handshake(netns, to).await?);
        let mut start = PREFACE.to_vec();
        start.extend(settings(&[
            (HEADER_TABLE_SIZE, 0),
            (INITIAL_WINDOW_SIZE, window),
        ]));
        // A server that rejects the certificate may have closed already; the first request then returns `Closed`.
        let _ = writer.write_all(&start).await;
        let _ = writer.flush().await;
        Ok(Self {
            reader: Reader {
                half: read,
                buffer: Vec::new(),
            },
            writer,
            next_stream_id: 1,
        })
    }

    /// Allocates the next stream id.
    pub fn next_stream_id(&mut self) -> u32 {
        let stream = self.next_stream_id;
        self.next_stream_id += 2;
        stream
    }

    /// Sends raw bytes.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).await.context("send")?;
        self.writer.flush().await.context("flush")
    }

    /// Sends all chunks while discarding what arrives. Returns `None` once all is sent, or how the peer ended the
    /// connection before that.
    ///
    /// # Errors
    /// After `timeout`, the peer has neither read all bytes nor ended the connection.
    pub async fn flood(
        &mut self,
        chunks: impl Iterator<Item = Vec<u8>>,
        timeout: Duration,
    ) -> Result<Option<ConnectResult>> {
        let Self { reader, writer, .. } = self;
        let write = async {
            for chunk in chunks {
                if writer.write_all(&chunk).await.is_err() || writer.flush().await.is_err() {
                    return std::future::pending().await;
                }
            }
        };
        let end = async {
            loop {
                match reader.next_frame().await {
                    None => return ConnectResult::Closed,
                    Some(frame) if frame.frame_type == FrameType::GoAway as u8 => {
                        return ConnectResult::GoAway(error_code(&frame.payload, 4));
                    }
                    Some(_) => {}
                }
            }
        };
        let either = async {
            tokio::select! {
                biased;
                result = end => Some(result),
                () = write => None,
            }
        };
        tokio::time::timeout(timeout, either)
            .await
            .context("the peer neither reads the flood nor ends the connection")
    }

    /// Reads the next frame other than SETTINGS and PING, which it acknowledges, and WINDOW_UPDATE. `None` at the end
    /// of the connection.
    ///
    /// # Errors
    /// Nothing arrives for 15 s.
    pub async fn next_frame(&mut self) -> Result<Option<Frame>> {
        loop {
            let next = tokio::time::timeout(RESPONSE_TIMEOUT, self.reader.next_frame()).await;
            let Some(received) = next.context("no frame arrived in 15 s")? else {
                return Ok(None);
            };
            let needs_ack = received.flags & END_STREAM == 0;
            match received.frame_type {
                frame_type if frame_type == FrameType::Settings as u8 && needs_ack => {
                    let _ = self
                        .send(&frame(FrameType::Settings, END_STREAM, 0, &[]))
                        .await;
                }
                frame_type if frame_type == FrameType::Ping as u8 && needs_ack => {
                    let _ = self
                        .send(&frame(FrameType::Ping, END_STREAM, 0, &received.payload))
                        .await;
                }
                frame_type
                    if frame_type == FrameType::Settings as u8
                        || frame_type == FrameType::Ping as u8 => {}
                frame_type if frame_type == FrameType::WindowUpdate as u8 => {}
                _ => return Ok(Some(received)),
            }
        }
    }

    /// Sends the frames of a request and waits for the response.
    ///
    /// # Errors
    /// Nothing arrives for 15 s.
    pub async fn request(&mut self, stream: u32, bytes: &[u8]) -> Result<ConnectResult> {
        // If the peer has ended the connection, the GOAWAY is still to be read.
        let _ = self.send(bytes).await;
        self.wait_result(stream).await
    }

    /// Waits for the response on a stream.
    ///
    /// # Errors
    /// Nothing arrives for 15 s.
    pub async fn wait_result(&mut self, stream: u32) -> Result<ConnectResult> {
        while let Some(frame) = self.next_frame().await? {
            let is_same_stream = frame.stream == stream;
            match frame.frame_type {
                frame_type if frame_type == FrameType::GoAway as u8 => {
                    return Ok(ConnectResult::GoAway(error_code(&frame.payload, 4)));
                }
                frame_type if frame_type == FrameType::RstStream as u8 && is_same_stream => {
                    return Ok(ConnectResult::Reset(error_code(&frame.payload, 0)));
                }
                frame_type if frame_type == FrameType::Headers as u8 && is_same_stream => {
                    let status = status(&frame.payload)
                        .with_context(|| format!("no status in {frame:?}"))?;
                    return Ok(ConnectResult::Status(status));
                }
                _ => {}
            }
        }
        Ok(ConnectResult::Closed)
    }

    /// Sends a CONNECT to `authority` on a new stream, and waits for the response.
    ///
    /// # Errors
    /// Nothing arrives for 15 s.
    pub async fn connect(&mut self, authority: &str) -> Result<ConnectResult> {
        let stream = self.next_stream_id();
        self.request(stream, &connect(stream, authority)).await
    }

    /// Reads DATA of a stream until at least `bytes` have arrived. Response headers are skipped.
    ///
    /// # Errors
    /// The stream or the connection ends before that, or nothing arrives for 15 s.
    pub async fn read_data(&mut self, stream: u32, bytes: usize) -> Result<Vec<u8>> {
        let mut data = Vec::new();
        while data.len() < bytes {
            let frame = self.next_frame().await?.context("the connection ended")?;
            anyhow::ensure!(
                frame.frame_type != FrameType::GoAway as u8,
                "GOAWAY {}",
                error_code(&frame.payload, 4)
            );
            if frame.stream == stream && frame.frame_type != FrameType::Headers as u8 {
                anyhow::ensure!(
                    frame.frame_type == FrameType::Data as u8,
                    "{frame:?} instead of DATA"
                );
                data.extend(frame.payload);
            }
        }
        Ok(data)
    }
}

impl Reader {
    /// Cancel-safe: a partial frame stays in the buffer.
    async fn next_frame(&mut self) -> Option<Frame> {
        self.fill(FRAME_HEADER_BYTES).await?;
        let length = u32::from_be_bytes([0, self.buffer[0], self.buffer[1], self.buffer[2]]);
        let end = FRAME_HEADER_BYTES + usize::try_from(length).ok()?;
        self.fill(end).await?;
        let bytes: Vec<u8> = self.buffer.drain(..end).collect();
        let stream = u32::from_be_bytes([bytes[5] & 0x7f, bytes[6], bytes[7], bytes[8]]);
        Some(Frame {
            frame_type: bytes[3],
            flags: bytes[4],
            stream,
            payload: bytes[FRAME_HEADER_BYTES..].to_vec(),
        })
    }

    async fn fill(&mut self, count: usize) -> Option<()> {
        while self.buffer.len() < count {
            if self.half.read_buf(&mut self.buffer).await.unwrap_or(0) == 0 {
                return None;
            }
        }
        Some(())
    }
}

/// The HTTP/2 error code at offset `at`.
fn error_code(payload: &[u8], at: usize) -> u32 {
    payload
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(u32::MAX, u32::from_be_bytes)
}
