//! The certificate authority, if it is a process of the lab.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use mesh::certs::Authority;

use super::Lab;
use super::daemons::read_log;
use crate::options::LaunchOptions;
use crate::protocol::{DaemonAction, ProgramState, Request, Status};

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
            ca.is_some_and(|ca| ca.state == ProgramState::Ready)
        };
        self.wait_status("the certificate authority", self.ready_deadline, ready)
            .map(drop)
    }

    /// Stops the certificate authority if it runs, and starts it in this way.
    ///
    /// # Errors
    /// The lab runs without one, or it does not listen at the deadline.
    pub fn restart_ca_with(&self, launch: LaunchOptions) -> Result<()> {
        self.stop_ca()?;
        self.client
            .ask(&Request::SetLaunchOptions { node: None, launch })?;
        self.start_ca()
    }

    /// Makes another root with a key of its own, and puts it into the folder of the certificate
    /// authority in place of the one that is there, as an operator does. Returns when the files are
    /// there; how a mesh then goes over from one to the other is the authority's affair.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn replace_ca_root(&self) -> Result<()> {
        let made = tempfile::tempdir_in(self.dir.root()).context("a folder for the new root")?;
        let made = made.path().join("authority");
        Authority::create(&made).context("a new root")?;
        for file in ["root-cert.pem", "ca-key.pem"] {
            std::fs::rename(made.join(file), self.ca_folder().join(file))
                .with_context(|| format!("cannot replace {file}"))?;
        }
        Ok(())
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
