//! A server that listens on the HBONE port of an address where a pod of the mesh should be.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::certs::Leaf;
use super::frames::{END_HEADERS, END_STREAM, FrameType, frame};
use super::netns::{Netns, block_on_in_netns};
use super::tls::TLS13_ONLY;

/// What the server does with each connection.
#[derive(Debug)]
pub enum Behaviour {
    /// Accepts the connection and sends nothing.
    Silent,
    /// Sends these bytes without TLS.
    Plain(&'static [u8]),
    /// Completes the TLS handshake and sends frames.
    Tls {
        /// The server's certificate.
        certificate: Leaf,
        /// Sent right after the handshake.
        first: Vec<u8>,
        /// Sent once a CONNECT has arrived.
        response: Vec<u8>,
    },
}

/// A running rogue server. Dropping the value stops it.
#[derive(Debug)]
pub struct RogueServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
    received: Arc<Mutex<Vec<u8>>>,
}

/// A SETTINGS frame without values.
pub fn empty_settings() -> Vec<u8> {
    frame(FrameType::Settings, 0, 0, &[])
}

/// The response HEADERS for the first request of a connection. `block` is the encoded `:status`.
pub fn response_headers(block: &[u8], end_stream: bool) -> Vec<u8> {
    let flags = END_HEADERS | if end_stream { END_STREAM } else { 0 };
    frame(FrameType::Headers, flags, 1, block)
}

impl RogueServer {
    /// Listens on the HBONE port of `ip` in a network namespace. Returns when the port is open.
    ///
    /// # Errors
    /// The port cannot be opened, or the certificate is not usable.
    pub fn start(netns: String, ip: IpAddr, behaviour: Behaviour) -> Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let (ready, listening) = std::sync::mpsc::channel();
        let received = Arc::<Mutex<Vec<u8>>>::default();
        let record = Arc::clone(&received);
        let thread = std::thread::spawn(move || {
            let netns = Netns {
                name: netns,
                is_marked: false,
            };
            block_on_in_netns(&netns, async |_| {
                let listener = TcpListener::bind(SocketAddr::new(ip, 15008)).await?;
                let responder = Arc::new(Responder::new(behaviour)?);
                ready.send(()).context("the starting thread has ended")?;
                tokio::select! {
                    end = serve(listener, responder, record) => end,
                    _ = stopped => Ok(()),
                }
            })
        });
        let started = listening.recv();
        let server = Self {
            stop: Some(stop),
            thread: Some(thread),
            received,
        };
        match started {
            Ok(()) => Ok(server),
            Err(_) => server
                .stop()
                .and_then(|()| anyhow::bail!("the server ended before it listened")),
        }
    }

    /// All bytes received so far, inside TLS connections and before TLS.
    pub fn received(&self) -> Vec<u8> {
        self.received
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Stops the server.
    ///
    /// # Errors
    /// The server could not listen or accept.
    pub fn stop(mut self) -> Result<()> {
        self.stop = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(end)) => end,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl Drop for RogueServer {
    fn drop(&mut self) {
        // Dropping the sender is the signal.
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A [`Behaviour`] with its TLS configuration.
enum Responder {
    Silent,
    Plain(&'static [u8]),
    Tls {
        acceptor: TlsAcceptor,
        first: Vec<u8>,
        response: Vec<u8>,
    },
}

impl Responder {
    fn new(behaviour: Behaviour) -> Result<Self> {
        let (certificate, first, response) = match behaviour {
            Behaviour::Silent => return Ok(Self::Silent),
            Behaviour::Plain(bytes) => return Ok(Self::Plain(bytes)),
            Behaviour::Tls {
                certificate,
                first,
                response,
            } => (certificate, first, response),
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(TLS13_ONLY)?
            .with_no_client_auth()
            .with_single_cert(certificate.chain, certificate.key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self::Tls {
            acceptor: Arc::new(config).into(),
            first,
            response,
        })
    }
}

async fn serve(
    listener: TcpListener,
    responder: Arc<Responder>,
    record: Arc<Mutex<Vec<u8>>>,
) -> Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        let (responder, record) = (Arc::clone(&responder), Arc::clone(&record));
        // A connection that fails is the daemon's decision, not an error of the server.
        connections.spawn(async move {
            let _ = respond(stream, &responder, &record).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn respond(
    mut stream: TcpStream,
    responder: &Responder,
    record: &Mutex<Vec<u8>>,
) -> Result<()> {
    match responder {
        Responder::Silent => read_all(&mut stream, record, None).await,
        Responder::Plain(bytes) => {
            stream.write_all(bytes).await?;
            read_all(&mut stream, record, None).await
        }
        Responder::Tls {
            acceptor,
            first,
            response,
        } => {
            let mut stream = acceptor.accept(stream).await?;
            stream.write_all(first).await?;
            stream.flush().await?;
            read_all(&mut stream, record, Some(response)).await
        }
    }
}

/// Records what arrives until the stream ends. Sends `response` when the HEADERS of stream 1 have arrived.
async fn read_all(
    stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
    record: &Mutex<Vec<u8>>,
    mut response: Option<&Vec<u8>>,
) -> Result<()> {
    // A HEADERS frame of stream 1, which is the first that a client may open.
    const CONNECT_FRAME: [u8; 6] = [FrameType::Headers as u8, END_HEADERS, 0, 0, 0, 1];
    let mut buffer = vec![0; 16 * 1024];
    let mut received = Vec::new();
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        record
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(&buffer[..read]);
        received.extend_from_slice(&buffer[..read]);
        let has_connect = received
            .windows(CONNECT_FRAME.len())
            .any(|window| window == CONNECT_FRAME);
        if has_connect && let Some(response) = response.take() {
            stream.write_all(response).await?;
            stream.flush().await?;
        }
    }
}
