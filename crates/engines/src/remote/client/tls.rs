//! TLS to engines.

use std::sync::Arc;

use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

use super::Secret;

/// How engines behind `https` are trusted, and what they are shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// Certificates in PEM of authorities to trust, besides the system's and Mozilla's.
    pub extra_ca: Option<Arc<str>>,
    /// Certificate chain and private key in PEM, for engines that ask who calls.
    pub client: Option<(Arc<str>, Secret)>,
    /// The name that the engine's certificate must carry, where the URL names it differently.
    pub server_name: Option<Arc<str>>,
}

/// What is wrong with TLS settings.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// No PEM, or none of the right kind.
    #[error("{what} is no PEM: {detail}")]
    Pem {
        /// `the CA file`, ...
        what: &'static str,
        /// The parser's sentence; it quotes nothing.
        detail: String,
    },
    /// Certificate and key do not fit together, or are of a kind that is not supported.
    #[error("the client certificate cannot be used: {0}")]
    Client(rustls::Error),
    /// Not a name of a host.
    #[error("{0:?} is no server name")]
    ServerName(Arc<str>),
    /// The TLS library lacks a protocol version.
    #[error("TLS cannot be set up: {0}")]
    Versions(rustls::Error),
}

impl TlsSettings {
    pub(super) fn config(&self) -> Result<ClientConfig, TlsError> {
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Versions)?
            .with_root_certificates(self.roots()?);
        let Some((chain, key)) = &self.client else { return Ok(builder.with_no_client_auth()) };
        let chain = certificates("the client certificate", chain)?;
        let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes())
            .map_err(|error| TlsError::Pem { what: "the client key", detail: error.to_string() })?;
        builder.with_client_auth_cert(chain, key).map_err(TlsError::Client)
    }

    pub(super) fn name(&self) -> Result<Option<ServerName<'static>>, TlsError> {
        let Some(name) = &self.server_name else { return Ok(None) };
        let parsed = ServerName::try_from(name.to_string());
        parsed.map(Some).map_err(|_| TlsError::ServerName(name.clone()))
    }

    /// The system's authorities and Mozilla's: one of the two is missing in many containers.
    fn roots(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        // What cannot be read or parsed is left out: a broken certificate in a system's store is no reason not to start.
        let native = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(native.certs);
        if let Some(extra) = &self.extra_ca {
            for certificate in certificates("the CA file", extra)? {
                roots
                    .add(certificate)
                    .map_err(|error| TlsError::Pem { what: "the CA file", detail: error.to_string() })?;
            }
        }
        Ok(roots)
    }
}

fn certificates(what: &'static str, pem: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let parsed = parsed.map_err(|error| TlsError::Pem { what, detail: error.to_string() })?;
    if parsed.is_empty() {
        return Err(TlsError::Pem { what, detail: "it holds no certificate".to_owned() });
    }
    Ok(parsed)
}
