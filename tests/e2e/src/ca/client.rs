//! A client of the shipped certificate authority that sends any request.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit::ca::{Claims, ServiceAccount, TokenSigner};
use anyhow::{Context, Result};
use http::Uri;
use hyper_util::rt::TokioIo;
use lab::{Lab, Location};
use mesh::certs::istio_ca::proto::IstioCertificateRequest;
use mesh::certs::istio_ca::proto::istio_certificate_service_client::IstioCertificateServiceClient;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tower_service::Service;

use crate::hostile::{Netns, run_in_netns};

/// A few requests take less than a second; this leaves room for a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// Creates a certificate signing request without names, PEM.
///
/// # Errors
/// No key can be generated.
pub fn csr() -> Result<String> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let csr = params.serialize_request(&KeyPair::generate()?)?;
    csr.pem().context("PEM")
}

/// The claims of a token that is valid for an hour.
///
/// # Errors
/// `account` is not `namespace/name`.
pub fn token_claims(account: &str, impersonate: &[&str]) -> Result<Claims> {
    let (namespace, name) = account.split_once('/').context("namespace/name")?;
    let account = ServiceAccount::new(namespace, name).context("a service account")?;
    let impersonate = impersonate.iter().map(|one| (*one).to_owned()).collect();
    let hour = Duration::from_secs(3600);
    Ok(Claims::new(&account, "istio-ca", hour, impersonate))
}

/// Signs a token with the key in a file.
///
/// # Errors
/// The file holds no key.
pub fn sign_token(key: &Path, claims: &Claims) -> Result<String> {
    let key = TokenSigner::open(key).context("token key")?;
    key.sign(claims).context("sign the token")
}

/// Unix time, `offset` seconds from now.
pub fn unix_time(offset: i64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
        .as_secs()
        .saturating_add_signed(offset)
}

/// A connection to the lab's authority.
#[derive(Clone)]
pub struct CaClient(IstioCertificateServiceClient<Channel>);

/// A signing request.
#[derive(Debug, Clone, Copy)]
pub struct CsrRequest<'a> {
    /// The bearer token.
    pub token: Option<&'a str>,
    /// The CSR, PEM.
    pub csr: &'a str,
    /// The requested identity, sent as `ImpersonatedIdentity`.
    pub identity: Option<&'a str>,
    /// The requested validity in seconds.
    pub seconds: i64,
}

/// Runs `work` with a client in the network namespace of the lab's authority, outside the cluster.
///
/// # Errors
/// `work` fails, or takes more than a minute.
pub fn with_ca_client<T: Send>(
    lab: &Lab,
    work: impl AsyncFnOnce(CaClient) -> Result<T> + Send,
) -> Result<T> {
    let netns = Netns {
        name: lab.netns(&Location::Fabric)?,
        is_marked: false,
    };
    let address = lab.ca_address()?;
    let root = lab.ca_folder().join("root-cert.pem");
    run_in_netns(&netns, DEADLINE, async |_| {
        work(CaClient::new(address, &root)?).await
    })
}

impl CaClient {
    fn new(address: SocketAddr, root: &Path) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(root).context("root")?)?;
        let mut config =
            ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()?
                .with_root_certificates(roots)
                .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let tls = TlsConnector::from(Arc::new(config));
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
        let channel = endpoint.connect_with_connector_lazy(Connector { address, tls });
        Ok(Self(IstioCertificateServiceClient::new(channel)))
    }

    /// Sends the request and returns the certificate chain, PEM.
    ///
    /// # Errors
    /// The authority has refused it.
    pub async fn request_certificate(
        &self,
        csr_request: CsrRequest<'_>,
    ) -> Result<Vec<String>, Status> {
        let identity = |identity: &str| Struct {
            fields: [(
                "ImpersonatedIdentity".to_owned(),
                Value {
                    kind: Some(Kind::StringValue(identity.to_owned())),
                },
            )]
            .into(),
        };
        let mut request = Request::new(IstioCertificateRequest {
            csr: csr_request.csr.to_owned(),
            validity_duration: csr_request.seconds,
            metadata: csr_request.identity.map(identity),
        });
        if let Some(token) = csr_request.token {
            let bearer = MetadataValue::try_from(format!("Bearer {token}"));
            let bearer = bearer.map_err(|_| Status::internal("the token is not a header value"))?;
            request.metadata_mut().insert("authorization", bearer);
        }
        let response = self.0.clone().create_certificate(request).await?;
        Ok(response.into_inner().cert_chain)
    }
}

#[derive(Clone)]
struct Connector {
    address: SocketAddr,
    tls: TlsConnector,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let Self { address, tls } = self.clone();
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            let name = ServerName::IpAddress(address.ip().into());
            Ok(TokioIo::new(tls.connect(name, stream).await?))
        })
    }
}
