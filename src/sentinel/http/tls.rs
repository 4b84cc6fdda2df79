//! TLS as a client: who is believed, and who we say we are.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use super::HttpError;

/// Where distributions keep the certificates of public authorities.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Settings of one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsOptions {
    /// PEM file with the authorities that are believed; without it those of the system.
    pub ca: Option<PathBuf>,
    /// PEM files with our certificate chain and its key, where the peer asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Whether the peer's certificate is checked at all.
    pub verify: bool,
}

impl Default for TlsOptions {
    fn default() -> Self {
        Self { ca: None, identity: None, verify: true }
    }
}

impl TlsOptions {
    /// Reads the files.
    pub fn load(&self) -> Result<Arc<ClientConfig>, HttpError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|e| HttpError::Tls(e.to_string()))?;
        let builder = if self.verify {
            builder.with_root_certificates(self.roots()?)
        } else {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Unverified::new(&provider)))
        };
        let config = match &self.identity {
            Some((chain, key)) => {
                let chain = certificates(chain)?;
                let key = PrivateKeyDer::from_pem_file(key)
                    .map_err(|e| HttpError::Tls(format!("no private key in {}: {e}", key.display())))?;
                builder.with_client_auth_cert(chain, key).map_err(|e| HttpError::Tls(e.to_string()))?
            }
            None => builder.with_no_client_auth(),
        };
        Ok(Arc::new(config))
    }

    fn roots(&self) -> Result<RootCertStore, HttpError> {
        let mut roots = RootCertStore::empty();
        let system = || SYSTEM_ROOTS.iter().map(Path::new).find(|path| fs::exists(path).unwrap_or(false));
        let Some(path) = self.ca.as_deref().or_else(system) else {
            return Err(HttpError::Tls("no file with certificates of authorities; name one".into()));
        };
        let (added, _) = roots.add_parsable_certificates(certificates(path)?);
        if added == 0 { Err(HttpError::Tls(format!("no usable certificate in {}", path.display()))) } else { Ok(roots) }
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, HttpError> {
    let failed = |e: rustls::pki_types::pem::Error| HttpError::Tls(format!("certificates in {}: {e}", path.display()));
    CertificateDer::pem_file_iter(path).map_err(failed)?.collect::<Result<_, _>>().map_err(failed)
}

/// Believes any certificate: `verify = false`.
#[derive(Debug)]
struct Unverified(WebPkiSupportedAlgorithms);

impl Unverified {
    fn new(provider: &CryptoProvider) -> Self {
        Self(provider.signature_verification_algorithms)
    }
}

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
