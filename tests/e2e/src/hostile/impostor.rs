//! The other end of a tunnel as an attacker plays it: a server where a pod of the mesh should be.

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
use super::frames::{END_HEADERS, END_STREAM, Kind, frame};
use super::inside::{Origin, inside_until};
use super::tls::TLS13;

/// What it does to who connects.
#[derive(Debug)]
pub enum Act {
    /// Takes the connection and says nothing.
    Silence,
    /// Says this, which is not TLS.
    Say(&'static [u8]),
    /// Shakes hands with this certificate, and then sends these frames, the first of which answer the handshake and
    /// the others the request.
    Tunnel(Leaf, Vec<u8>, Vec<u8>),
}

/// A running impostor; it ends with this value.
#[derive(Debug)]
pub struct Impostor {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
    heard: Arc<Mutex<Vec<u8>>>,
}

/// A server's SETTINGS without values.
pub fn no_settings() -> Vec<u8> {
    frame(Kind::Settings, 0, 0, &[])
}

/// The answer to the first request of a connection: a header block that is a status, of the static table or a literal.
pub fn status(block: &[u8], end_stream: bool) -> Vec<u8> {
    let flags = END_HEADERS | if end_stream { END_STREAM } else { 0 };
    frame(Kind::Headers, flags, 1, block)
}

impl Impostor {
    /// Listens on the HBONE port of `ip` in a network namespace. Returns when it does.
    ///
    /// # Errors
    /// It cannot listen, or the certificate is not usable.
    pub fn start(netns: String, ip: IpAddr, act: Act) -> Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let (ready, listening) = std::sync::mpsc::channel();
        let heard = Arc::<Mutex<Vec<u8>>>::default();
        let ears = Arc::clone(&heard);
        let thread = std::thread::spawn(move || {
            let origin = Origin {
                netns,
                marked: false,
            };
            inside_until(&origin, async |_| {
                let listener = TcpListener::bind(SocketAddr::new(ip, 15008)).await?;
                let act = Arc::new(Prepared::new(act)?);
                ready.send(()).context("nobody waits")?;
                tokio::select! {
                    end = serve(listener, act, ears) => end,
                    _ = stopped => Ok(()),
                }
            })
        });
        let started = listening.recv();
        let impostor = Self {
            stop: Some(stop),
            thread: Some(thread),
            heard,
        };
        match started {
            Ok(()) => Ok(impostor),
            Err(_) => impostor
                .end()
                .and_then(|()| anyhow::bail!("it ended before it listened")),
        }
    }

    /// All that it was told inside its TLS connections, or before one.
    pub fn heard(&self) -> Vec<u8> {
        self.heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Ends it and says whether it served well.
    ///
    /// # Errors
    /// It could not listen or accept.
    pub fn end(mut self) -> Result<()> {
        self.stop = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(end)) => end,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        // Dropping the sender is the signal.
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An act whose TLS is configured.
enum Prepared {
    Silence,
    Say(&'static [u8]),
    Tunnel(TlsAcceptor, Vec<u8>, Vec<u8>),
}

impl Prepared {
    fn new(act: Act) -> Result<Self> {
        let (leaf, first, then) = match act {
            Act::Silence => return Ok(Self::Silence),
            Act::Say(bytes) => return Ok(Self::Say(bytes)),
            Act::Tunnel(leaf, first, then) => (leaf, first, then),
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(TLS13)?
            .with_no_client_auth()
            .with_single_cert(leaf.chain, leaf.key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self::Tunnel(Arc::new(config).into(), first, then))
    }
}

async fn serve(listener: TcpListener, act: Arc<Prepared>, ears: Arc<Mutex<Vec<u8>>>) -> Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        let (act, ears) = (Arc::clone(&act), Arc::clone(&ears));
        // What happens on one connection is for the daemon to judge, not for us.
        connections.spawn(async move {
            let _ = perform(stream, &act, &ears).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn perform(mut stream: TcpStream, act: &Prepared, ears: &Mutex<Vec<u8>>) -> Result<()> {
    match act {
        Prepared::Silence => listen(&mut stream, ears, None).await,
        Prepared::Say(bytes) => {
            stream.write_all(bytes).await?;
            listen(&mut stream, ears, None).await
        }
        Prepared::Tunnel(acceptor, first, then) => {
            let mut stream = acceptor.accept(stream).await?;
            stream.write_all(first).await?;
            stream.flush().await?;
            listen(&mut stream, ears, Some(then)).await
        }
    }
}

/// Hears all there is to hear; `then` is said when a CONNECT has come.
async fn listen(
    stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
    ears: &Mutex<Vec<u8>>,
    mut then: Option<&Vec<u8>>,
) -> Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    let mut heard = Vec::new();
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        ears.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(&buffer[..read]);
        heard.extend_from_slice(&buffer[..read]);
        // A HEADERS frame of stream 1, which is the first that a client may open.
        let headers = [Kind::Headers as u8, END_HEADERS, 0, 0, 0, 1];
        if heard.windows(headers.len()).any(|window| window == headers)
            && let Some(then) = then.take()
        {
            stream.write_all(then).await?;
            stream.flush().await?;
        }
    }
}
