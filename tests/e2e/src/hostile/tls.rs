//! A TLS client that offers any certificate, ALPN and version, and accepts every server.

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
use super::netns::Netns;

/// The only ALPN protocol of an HBONE port.
pub const ALPN_H2: &[&[u8]] = &[b"h2"];

/// The only TLS version of an HBONE port.
pub static TLS13_ONLY: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// What a client offers in its handshake.
#[derive(Debug, Clone, Copy)]
pub struct TlsClient<'a> {
    /// The client certificate.
    pub certificate: Option<&'a Leaf>,
    /// ALPN protocols in order; empty sends no ALPN extension.
    pub alpn: &'a [&'a [u8]],
    /// The offered TLS versions.
    pub versions: &'a [&'static SupportedProtocolVersion],
}

impl<'a> TlsClient<'a> {
    /// A client that offers what a mesh daemon offers, with this certificate.
    pub fn with_certificate(certificate: &'a Leaf) -> Self {
        Self {
            certificate: Some(certificate),
            alpn: ALPN_H2,
            versions: TLS13_ONLY,
        }
    }

    /// Connects and completes the handshake. In TLS 1.3 the server's rejection of the client certificate arrives with
    /// the first read, so a successful handshake does not mean that the server has accepted the client.
    ///
    /// # Errors
    /// The connect or the handshake fails.
    pub async fn handshake(&self, netns: &Netns, to: SocketAddr) -> Result<TlsStream<TcpStream>> {
        let transport = netns.connect(to).await?;
        let name = ServerName::IpAddress(to.ip().into());
        let connector = TlsConnector::from(Arc::new(self.config()?));
        connector
            .connect(name, transport)
            .await
            .context("TLS handshake")
    }

    fn config(&self) -> Result<ClientConfig> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = Arc::new(AcceptAnyServer(Arc::clone(&provider)));
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

/// A verifier that accepts every server certificate.
#[derive(Debug)]
struct AcceptAnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyServer {
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
