//! Controls the certificate authority, if it is a process of the lab.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result};
use mesh::certs::Authority;

use super::Lab;
use super::daemons::read_log;
use crate::options::LaunchOptions;
use crate::protocol::{ProgramAction, ProgramState, Request, Status};

impl Lab {
    /// Kills the certificate authority with SIGKILL. It stays stopped until [`Self::start_ca`].
    ///
    /// # Errors
    /// The lab runs without one.
    pub fn kill_ca(&self) -> Result<()> {
        self.ca(ProgramAction::Kill)
    }

    /// Sends SIGTERM to the certificate authority and waits for its exit.
    ///
    /// # Errors
    /// The lab runs without one, or it does not exit.
    pub fn stop_ca(&self) -> Result<()> {
        self.ca(ProgramAction::Stop)
    }

    /// Starts the certificate authority if it does not run, and waits until it listens.
    ///
    /// # Errors
    /// The lab runs without one, or it does not listen at the timeout.
    pub fn start_ca(&self) -> Result<()> {
        self.ca(ProgramAction::Start)?;
        let is_ready = |status: &Status| {
            let ca = status.ca.as_ref();
            ca.is_some_and(|ca| ca.state == ProgramState::Ready)
        };
        self.wait_status("the certificate authority", self.ready_timeout, is_ready)
            .map(drop)
    }

    /// Stops the certificate authority if it runs, and starts it with these options.
    ///
    /// # Errors
    /// The lab runs without one, or it does not listen at the timeout.
    pub fn restart_ca_with(&self, launch: LaunchOptions) -> Result<()> {
        self.stop_ca()?;
        self.client
            .send(&Request::SetLaunchOptions { node: None, launch })?;
        self.start_ca()
    }

    /// Creates a new root with a new key and replaces the root in the folder of the certificate
    /// authority, as an operator does. Returns when the files are written; the certificate authority
    /// then moves the mesh to the new root.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn replace_ca_root(&self) -> Result<()> {
        let folder = tempfile::tempdir_in(self.dir.root()).context("a folder for the new root")?;
        let new_root = folder.path().join("authority");
        Authority::create(&new_root).context("a new root")?;
        for file in ["root-cert.pem", "ca-key.pem"] {
            std::fs::rename(new_root.join(file), self.ca_folder().join(file))
                .with_context(|| format!("cannot replace {file}"))?;
        }
        Ok(())
    }

    /// The address on which the certificate authority serves.
    ///
    /// # Errors
    /// The lab runs without one.
    pub fn ca_address(&self) -> Result<SocketAddr> {
        let ca = self.status()?.ca;
        Ok(ca
            .context("this lab runs without a certificate authority")?
            .address)
    }

    /// The log of the certificate authority, of all its runs.
    ///
    /// # Errors
    /// There is no such log.
    pub fn ca_log(&self) -> Result<String> {
        read_log(&self.dir.ca_log())
    }

    /// The file with the token of a node. The daemon reads it for every request.
    pub fn token_file(&self, node: &str) -> PathBuf {
        self.dir.token(node)
    }

    fn ca(&self, action: ProgramAction) -> Result<()> {
        self.client.send(&Request::Ca { action }).map(drop)
    }
}
