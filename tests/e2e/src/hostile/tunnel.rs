//! An HTTP/2 connection on which everything may be said.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::frames::{END_STREAM, Frame, Kind, connect, frame, settings, status};
use super::inside::Origin;
use super::tls::Hello;

/// The client's first bytes, RFC 9113 section 3.4.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long the peer may take to answer one frame.
const ANSWER: Duration = Duration::from_secs(15);

/// Bytes of a frame before its payload.
const HEAD: usize = 9;

/// SETTINGS_HEADER_TABLE_SIZE
const HEADER_TABLE_SIZE: u16 = 1;
/// SETTINGS_INITIAL_WINDOW_SIZE
const INITIAL_WINDOW_SIZE: u16 = 4;

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It was answered.
    Status(u16),
    /// Its stream was reset with this HTTP/2 error code.
    Reset(u32),
    /// The whole connection was refused with this HTTP/2 error code.
    GoAway(u32),
    /// The connection ended, or broke, without a word of HTTP/2.
    Closed,
}

/// A TLS connection that has said the HTTP/2 preface.
pub struct Tunnel {
    reader: Reader,
    writer: WriteHalf<TlsStream<TcpStream>>,
    next: u32,
}

struct Reader {
    half: ReadHalf<TlsStream<TcpStream>>,
    buffer: Vec<u8>,
}

impl Tunnel {
    /// Shakes hands and sends preface and SETTINGS. The peer may use no header table, so that its answers can be read
    /// without one, and may send us `window` bytes per stream.
    ///
    /// # Errors
    /// The peer refuses the connection or the handshake.
    pub async fn open(
        hello: &Hello<'_>,
        origin: &Origin,
        to: SocketAddr,
        window: u32,
    ) -> Result<Self> {
        let (read, mut writer) = tokio::io::split(hello.handshake(origin, to).await?);
        let mut start = PREFACE.to_vec();
        start.extend(settings(&[
            (HEADER_TABLE_SIZE, 0),
            (INITIAL_WINDOW_SIZE, window),
        ]));
        // A server that refuses our certificate may have closed already; the answer to the first request says so.
        let _ = writer.write_all(&start).await;
        let _ = writer.flush().await;
        Ok(Self {
            reader: Reader {
                half: read,
                buffer: Vec::new(),
            },
            writer,
            next: 1,
        })
    }

    /// The stream number that comes next.
    pub fn stream(&mut self) -> u32 {
        let stream = self.next;
        self.next += 2;
        stream
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).await.context("send")?;
        self.writer.flush().await.context("flush")
    }

    /// Sends as much of `bytes` as the peer takes until it ends the connection, reading whatever it says. Returns the
    /// connection's error code if it said GOAWAY, and `None` if it took all.
    ///
    /// # Errors
    /// The peer neither takes the bytes nor ends the connection within the time.
    pub async fn flood(
        &mut self,
        bytes: impl Iterator<Item = Vec<u8>>,
        within: Duration,
    ) -> Result<Option<Answer>> {
        let Self { reader, writer, .. } = self;
        let write = async {
            for chunk in bytes {
                if writer.write_all(&chunk).await.is_err() || writer.flush().await.is_err() {
                    return std::future::pending().await;
                }
            }
        };
        let end = async {
            loop {
                match reader.next().await {
                    None => return Answer::Closed,
                    Some(frame) if frame.kind == Kind::GoAway as u8 => {
                        return Answer::GoAway(code(&frame.payload, 4));
                    }
                    Some(_) => {}
                }
            }
        };
        let either = async {
            tokio::select! {
                biased;
                answer = end => Some(answer),
                () = write => None,
            }
        };
        tokio::time::timeout(within, either)
            .await
            .context("the flood is neither taken nor refused")
    }

    /// The next frame but SETTINGS and PING, which are acknowledged, and WINDOW_UPDATE; `None` at the connection's end.
    ///
    /// # Errors
    /// The peer says nothing for 15 s.
    pub async fn next(&mut self) -> Result<Option<Frame>> {
        loop {
            let next = tokio::time::timeout(ANSWER, self.reader.next()).await;
            let Some(received) = next.context("the peer says nothing")? else {
                return Ok(None);
            };
            let wants_ack = received.flags & END_STREAM == 0;
            match received.kind {
                kind if kind == Kind::Settings as u8 && wants_ack => {
                    let _ = self.send(&frame(Kind::Settings, END_STREAM, 0, &[])).await;
                }
                kind if kind == Kind::Ping as u8 && wants_ack => {
                    let _ = self
                        .send(&frame(Kind::Ping, END_STREAM, 0, &received.payload))
                        .await;
                }
                kind if kind == Kind::Settings as u8 || kind == Kind::Ping as u8 => {}
                kind if kind == Kind::WindowUpdate as u8 => {}
                _ => return Ok(Some(received)),
            }
        }
    }

    /// Sends a request whose frames are `bytes` and waits for what becomes of it.
    ///
    /// # Errors
    /// The peer says nothing for 15 s.
    pub async fn ask(&mut self, stream: u32, bytes: &[u8]) -> Result<Answer> {
        // A peer that has ended the connection has said why, which is then read.
        let _ = self.send(bytes).await;
        self.answer(stream).await
    }

    /// Waits for what becomes of the stream.
    ///
    /// # Errors
    /// The peer says nothing for 15 s.
    pub async fn answer(&mut self, stream: u32) -> Result<Answer> {
        while let Some(frame) = self.next().await? {
            let ours = frame.stream == stream;
            match frame.kind {
                kind if kind == Kind::GoAway as u8 => {
                    return Ok(Answer::GoAway(code(&frame.payload, 4)));
                }
                kind if kind == Kind::Reset as u8 && ours => {
                    return Ok(Answer::Reset(code(&frame.payload, 0)));
                }
                kind if kind == Kind::Headers as u8 && ours => {
                    let status = status(&frame.payload)
                        .with_context(|| format!("no status in {frame:?}"))?;
                    return Ok(Answer::Status(status));
                }
                _ => {}
            }
        }
        Ok(Answer::Closed)
    }

    /// Asks for a stream to `authority`.
    ///
    /// # Errors
    /// The peer says nothing for 15 s.
    pub async fn connect(&mut self, authority: &str) -> Result<Answer> {
        let stream = self.stream();
        self.ask(stream, &connect(stream, authority)).await
    }

    /// Waits for DATA of the stream until `bytes` of it have come, and returns them. The answer to its request
    /// may still be to come.
    ///
    /// # Errors
    /// The stream or the connection ends before, or the peer says nothing for 15 s.
    pub async fn data(&mut self, stream: u32, bytes: usize) -> Result<Vec<u8>> {
        let mut data = Vec::new();
        while data.len() < bytes {
            let frame = self.next().await?.context("the connection ended")?;
            anyhow::ensure!(
                frame.kind != Kind::GoAway as u8,
                "the peer said GOAWAY {}",
                code(&frame.payload, 4)
            );
            if frame.stream == stream && frame.kind != Kind::Headers as u8 {
                anyhow::ensure!(frame.kind == Kind::Data as u8, "{frame:?} instead of DATA");
                data.extend(frame.payload);
            }
        }
        Ok(data)
    }
}

impl Reader {
    /// Cancel-safe: what was read stays in the buffer until all of the frame is there.
    async fn next(&mut self) -> Option<Frame> {
        self.fill(HEAD).await?;
        let length = u32::from_be_bytes([0, self.buffer[0], self.buffer[1], self.buffer[2]]);
        let end = HEAD + usize::try_from(length).ok()?;
        self.fill(end).await?;
        let bytes: Vec<u8> = self.buffer.drain(..end).collect();
        let stream = u32::from_be_bytes([bytes[5] & 0x7f, bytes[6], bytes[7], bytes[8]]);
        Some(Frame {
            kind: bytes[3],
            flags: bytes[4],
            stream,
            payload: bytes[HEAD..].to_vec(),
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

/// The four bytes at `at`, as an HTTP/2 error code.
fn code(payload: &[u8], at: usize) -> u32 {
    payload
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(u32::MAX, u32::from_be_bytes)
}
