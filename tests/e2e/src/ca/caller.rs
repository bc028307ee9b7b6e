//! A caller of an authority that asks for anything.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Turn, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ambit::ca::{Account, Claims, TokenKey};
use anyhow::{Context, Result};
use http::Uri;
use hyper_util::rt::TokioIo;
use lab::{Lab, Location};
use mesh::certs::istio_ca::proto::IstioCertificateRequest;
use mesh::certs::istio_ca::proto::istio_certificate_service_client::IstioCertificateServiceClient;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, DnType, KeyPair, SanType};
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

use crate::hostile::{Origin, inside};

/// A thousand requests take a few seconds on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// A certificate signing request and the key that it is for.
pub struct Csr {
    /// PEM.
    pub pem: String,
    /// The key.
    pub key: KeyPair,
}

impl Csr {
    /// With these names and this common name, and if asked for, with the wish to be an authority.
    ///
    /// # Errors
    /// A name cannot be in a certificate.
    pub fn new(names: Vec<SanType>, common_name: Option<&str>, authority: bool) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(name) = common_name {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params.subject_alt_names = names;
        if authority {
            // basicConstraints (2.5.29.19) with cA TRUE, which no typed field of a request has.
            let wish = vec![0x30, 0x03, 0x01, 0x01, 0xff];
            let wish = CustomExtension::from_oid_content(&[2, 5, 29, 19], wish);
            params.custom_extensions.push(wish);
        }
        let key = KeyPair::generate()?;
        let pem = params.serialize_request(&key)?.pem()?;
        Ok(Self { pem, key })
    }

    /// Without names, as a daemon may ask.
    ///
    /// # Errors
    /// No key could be made.
    pub fn plain() -> Result<Self> {
        Self::new(Vec::new(), None, false)
    }
}

/// The claims of a token that holds for an hour.
///
/// # Errors
/// `account` is not `namespace/name`.
pub fn claims(account: &str, impersonate: &[&str]) -> Result<Claims> {
    let (namespace, name) = account.split_once('/').context("namespace/name")?;
    let account = Account::new(namespace, name).context("a service account")?;
    let impersonate = impersonate.iter().map(|one| (*one).to_owned()).collect();
    let hour = Duration::from_secs(3600);
    Ok(Claims::new(&account, "istio-ca", hour, impersonate))
}

/// Signs claims with a key in a file.
///
/// # Errors
/// The file holds no key.
pub fn signed(key: &Path, claims: &Claims) -> Result<String> {
    let key = TokenKey::open(key).context("the key of tokens")?;
    key.sign(claims).context("a token")
}

/// Seconds since 1970, some seconds from now.
pub fn unix_time(from_now: i64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default()
        .as_secs()
        .saturating_add_signed(from_now)
}

/// A connection to the lab's authority.
#[derive(Clone)]
pub struct Caller(IstioCertificateServiceClient<Channel>);

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Shown as a bearer token.
    pub token: Option<&'a str>,
    /// PEM.
    pub csr: &'a str,
    /// Whom the certificate is to be for.
    pub identity: Option<&'a str>,
    /// How long it is to live.
    pub seconds: i64,
}

/// Runs `work` with a caller, outside the cluster of the lab, where its authority is.
///
/// # Errors
/// The work fails, or is not done within a minute.
pub fn calling<T: Send>(
    lab: &Lab,
    work: impl AsyncFnOnce(Caller) -> Result<T> + Send,
) -> Result<T> {
    let origin = Origin {
        netns: lab.netns(&Location::Fabric)?,
        marked: false,
    };
    let address = lab.ca_address()?;
    let root = lab.ca_folder().join("root-cert.pem");
    inside(&origin, DEADLINE, async |_| {
        work(Caller::new(address, &root)?).await
    })
}

impl Caller {
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

    /// Asks; the texts of the answer.
    ///
    /// # Errors
    /// It was refused.
    pub async fn ask(&self, ask: Ask<'_>) -> Result<Vec<String>, Status> {
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
            csr: ask.csr.to_owned(),
            validity_duration: ask.seconds,
            metadata: ask.identity.map(identity),
        });
        if let Some(token) = ask.token {
            let bearer = MetadataValue::try_from(format!("Bearer {token}"));
            let bearer = bearer.map_err(|_| Status::internal("the token is no header"))?;
            request.metadata_mut().insert("authorization", bearer);
        }
        let answer = self.0.clone().create_certificate(request).await?;
        Ok(answer.into_inner().cert_chain)
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

    fn poll_ready(&mut self, _: &mut Turn<'_>) -> Poll<io::Result<()>> {
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
