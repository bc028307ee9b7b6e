//! The certificate authority, if it is a process of the lab.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::Lab;
use super::daemons::read_log;
use crate::options::Launch;
use crate::protocol::{DaemonAction, DaemonState, Request, Status};

impl Lab {
    /// Kills the certificate authority with SIGKILL; it stays dead until [`Self::start_ca`].
    ///
    /// # Errors
    /// The lab runs without one.
    pub fn kill_ca(&self) -> Result<()> {
        self.ca(DaemonAction::Kill)
    }

    /// Sends SIGTERM to the certificate authority and waits for its exit.
    ///
    /// # Errors
    /// The lab runs without one, or it did not exit.
    pub fn stop_ca(&self) -> Result<()> {
        self.ca(DaemonAction::Stop)
    }

    /// Starts the certificate authority again, if it does not run, and waits until it listens.
    ///
    /// # Errors
    /// It does not at the deadline.
    pub fn start_ca(&self) -> Result<()> {
        self.ca(DaemonAction::Start)?;
        let ready = |status: &Status| {
            let ca = status.ca.as_ref();
            ca.is_some_and(|ca| ca.state == DaemonState::Ready)
        };
        self.wait_status("the certificate authority", self.ready_deadline, ready)
            .map(drop)
    }

    /// Stops the certificate authority if it runs, and starts it in this way.
    ///
    /// # Errors
    /// The lab runs without one, or it does not listen at the deadline.
    pub fn restart_ca_as(&self, launch: Launch) -> Result<()> {
        self.stop_ca()?;
        self.client.ask(&Request::Launch { node: None, launch })?;
        self.start_ca()
    }

    /// Where the certificate authority serves.
    ///
    /// # Errors
    /// The lab runs without one.
    pub fn ca_address(&self) -> Result<SocketAddr> {
        let ca = self.status()?.ca;
        Ok(ca
            .context("this lab runs without a certificate authority")?
            .address)
    }

    /// What the certificate authority has logged, over all its lives.
    ///
    /// # Errors
    /// There is no such log.
    pub fn ca_log(&self) -> Result<String> {
        read_log(&self.dir.ca_log())
    }

    /// The file with the token of a node; what replaces it is read for the next call.
    pub fn token_file(&self, node: &str) -> PathBuf {
        self.dir.token(node)
    }

    fn ca(&self, action: DaemonAction) -> Result<()> {
        self.client.ask(&Request::Ca { action }).map(drop)
    }
}
