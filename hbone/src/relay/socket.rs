//! How both kinds of relay treat an application's socket: when it is reset, how a reset or FIN is detected and sent.

use std::io::{self, Read};
use std::ops::{Deref, DerefMut};

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Reads of one direction before the task yields to the other connections of its thread.
pub(crate) const READS_PER_YIELD: usize = 4;

/// An application's socket that closes with RST unless both directions have ended with FIN.
///
/// Whatever fails, and also if the relay is dropped early, the application never mistakes a broken connection for one
/// that has ended.
pub(crate) struct ResetOnDrop {
    tcp: TcpStream,
    is_finished: bool,
}

impl ResetOnDrop {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        // Best effort: without TCP_NODELAY small writes are delayed, not wrong.
        let _delayed = tcp.set_nodelay(true);
        Self {
            tcp,
            is_finished: false,
        }
    }

    /// Both directions have ended with FIN: closes without RST.
    pub(crate) fn finish(mut self) {
        self.is_finished = true;
    }
}

impl Deref for ResetOnDrop {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        &self.tcp
    }
}

impl DerefMut for ResetOnDrop {
    fn deref_mut(&mut self) -> &mut TcpStream {
        &mut self.tcp
    }
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if !self.is_finished {
            // Fails only on a socket that is already closed.
            let _closed = self.tcp.set_zero_linger();
        }
    }
}

/// Resolves when the socket has been reset, also while no task reads it. A FIN is not an error.
pub(crate) async fn wait_for_reset(tcp: &TcpStream) -> io::Error {
    match tcp.ready(Interest::ERROR).await {
        Ok(_) => match tcp.take_error() {
            Ok(Some(error)) | Err(error) => error,
            Ok(None) => io::ErrorKind::ConnectionReset.into(),
        },
        Err(error) => error,
    }
}

/// Sends FIN. Succeeds if the application has closed the connection already.
pub(crate) fn shutdown_write(tcp: &TcpStream) -> io::Result<()> {
    match SockRef::from(tcp).shutdown(std::net::Shutdown::Write) {
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// Reads what is in the kernel's buffer; 0 bytes if it is empty.
///
/// Reads the socket directly, because the runtime updates readiness only at its next poll, and a failed write often
/// reveals a reset before that.
pub(crate) fn read_available(from: &TcpStream, buffer: &mut [u8]) -> usize {
    (&*SockRef::from(from)).read(buffer).unwrap_or(0)
}
