//! TLS as an attacker speaks it: any certificate, any version, and no doubt about the server.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme, SupportedProtocolVersion};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::certs::Leaf;
use super::inside::Origin;

/// The only protocol of an HBONE port.
pub const H2: &[&[u8]] = &[b"h2"];

/// The only TLS version of an HBONE port.
pub static TLS13: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// What a client says first.
#[derive(Debug, Clone, Copy)]
pub struct Hello<'a> {
    /// Who it says it is.
    pub certificate: Option<&'a Leaf>,
    /// ALPN, in order; empty sends none.
    pub alpn: &'a [&'a [u8]],
    /// The TLS versions that it offers.
    pub versions: &'a [&'static SupportedProtocolVersion],
}

impl<'a> Hello<'a> {
    /// What a member of the mesh says.
    pub fn of(certificate: &'a Leaf) -> Self {
        Self {
            certificate: Some(certificate),
            alpn: H2,
            versions: TLS13,
        }
    }

    /// Connects and shakes hands. In TLS 1.3 a server's refusal of the client's certificate comes only with the first
    /// read, so this may succeed although we are not welcome.
    ///
    /// # Errors
    /// The connect or the handshake fails.
    pub async fn handshake(&self, origin: &Origin, to: SocketAddr) -> Result<TlsStream<TcpStream>> {
        let transport = origin.connect(to).await?;
        let name = ServerName::IpAddress(to.ip().into());
        let connector = TlsConnector::from(Arc::new(self.config()?));
        connector
            .connect(name, transport)
            .await
            .context("TLS handshake")
    }

    fn config(&self) -> Result<ClientConfig> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = Arc::new(Anybody(Arc::clone(&provider)));
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(self.versions)?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match self.certificate {
            Some(leaf) => {
                builder.with_client_auth_cert(leaf.chain.clone(), leaf.key.clone_key())?
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = self.alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(config)
    }
}

/// Believes every server.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
