//! Mutual TLS between the processes of a fleet, from PEM files.
//!
//! In: a CA, a certificate with its chain, and its key. Out: what tonic takes, or a [`TlsError`] that says which file is
//! wrong and how. Both sides show a certificate and each believes only the CA: a process that the fleet's CA has not
//! signed can neither attach an engine nor pose as a gateway.
//!
//! Start at [`TlsFiles`]. Files are checked when they are loaded, so that a process with a wrong file does not start (or,
//! at a reload, keeps what it has) instead of failing at its first handshake.

use std::{
    fmt, fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    CertificateError, RootCertStore,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{ParsedCertificate, WebPkiClientVerifier},
    sign::CertifiedKey,
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity as TonicIdentity, ServerTlsConfig};

/// Bytes of a PEM file; the bundle of all public CAs is a fifth of it.
pub const PEM_BYTES_MAX: u64 = 1 << 20;
/// How long a peer may take for its part of a handshake.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// One PEM file as it was read: where from, for errors, and what is in it. `Debug` prints the path alone.
#[derive(Clone, PartialEq, Eq)]
pub struct Pem {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Pem {
    /// A file whose content is at hand.
    pub fn new(path: impl Into<PathBuf>, bytes: impl Into<Vec<u8>>) -> Self {
        Self { path: path.into(), bytes: bytes.into() }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is larger than [`PEM_BYTES_MAX`].
    pub fn read(path: &Path) -> Result<Self, TlsError> {
        let read = || -> io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            fs::File::open(path)?.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().map_err(|cause| TlsError::Unreadable { path: path.to_owned(), cause })?;
        if bytes.len() as u64 > PEM_BYTES_MAX {
            return Err(TlsError::wrong(
                path,
                format!("is larger than {PEM_BYTES_MAX} bytes: not a PEM file"),
            ));
        }
        Ok(Self::new(path, bytes))
    }

    /// Whether a line of it says so; for hints in errors.
    fn mentions(&self, label: &str) -> bool {
        String::from_utf8_lossy(&self.bytes).contains(label)
    }
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

/// What is wrong with which file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It is not what it should be.
    #[error("{} {wrong}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; continues the path to a sentence.
        wrong: String,
    },
    /// A server without a certificate.
    #[error("a server needs a certificate and its key beside the CA")]
    NoIdentity,
}

impl TlsError {
    fn wrong(path: &Path, wrong: impl Into<String>) -> Self {
        Self::Wrong { path: path.to_owned(), wrong: wrong.into() }
    }
}

/// A certificate, its chain after it, and its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The certificate first, then those between it and the CA.
    pub cert: Pem,
    /// Its private key, not encrypted.
    pub key: Pem,
}

/// The files of one side, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    ca: Pem,
    identity: Option<Identity>,
}

impl TlsFiles {
    /// Checks that each file is what it should be and that the key belongs to the certificate. Without an identity it is
    /// good only for a client of servers that ask for none.
    ///
    /// # Errors
    /// The first file that is wrong, and how.
    pub fn new(ca: Pem, identity: Option<Identity>) -> Result<Self, TlsError> {
        roots(&ca)?;
        if let Some(identity) = &identity {
            check_identity(identity)?;
        }
        Ok(Self { ca, identity })
    }

    /// Reads and checks files.
    ///
    /// # Errors
    /// The first file that cannot be read or is wrong, and how.
    pub fn read(ca: &Path, identity: Option<(&Path, &Path)>) -> Result<Self, TlsError> {
        let identity = identity
            .map(|(cert, key)| Ok(Identity { cert: Pem::read(cert)?, key: Pem::read(key)? }))
            .transpose()?;
        Self::new(Pem::read(ca)?, identity)
    }

    /// For a server that takes only clients whose certificate the CA has signed.
    ///
    /// # Errors
    /// There is no identity.
    pub fn server(&self) -> Result<ServerTlsConfig, TlsError> {
        let Self { ca, identity } = self;
        let identity = identity.as_ref().ok_or(TlsError::NoIdentity)?;
        // tonic takes the process's provider; without one, rustls guesses from its features, and panics if a dependency
        // has switched on a second. An error here means that the process has chosen one already.
        _ = ring::default_provider().install_default();
        Ok(ServerTlsConfig::new()
            .identity(tonic_identity(identity))
            .client_ca_root(Certificate::from_pem(&ca.bytes))
            .timeout(HANDSHAKE_MAX))
    }

    /// For a client that takes only servers whose certificate the CA has signed for `server_name`, or for the host of the
    /// address that is dialled. Do not print the answer with `Debug`: tonic's shows the key.
    pub fn client(&self, server_name: Option<&str>) -> ClientTlsConfig {
        let Self { ca, identity } = self;
        let mut config =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&ca.bytes)).timeout(HANDSHAKE_MAX);
        if let Some(identity) = identity {
            config = config.identity(tonic_identity(identity));
        }
        match server_name {
            Some(name) => config.domain_name(name),
            None => config,
        }
    }

    /// What peers with the same CA will object to at `now`, as a sentence for the log and for `doctor`. Not an error of
    /// [`TlsFiles::new`]: clocks differ, and peers may have another CA.
    pub fn objection(&self, now: UnixTime) -> Option<String> {
        let Identity { cert, key: _ } = self.identity.as_ref()?;
        let chain = certificates(cert).ok()?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots(&self.ca).ok()?), provider())
                .build()
                .ok()?;
        let (leaf, between) = chain.split_first()?;
        let path = cert.path.display();
        match verifier.verify_client_cert(leaf, between, now) {
            Err(rustls::Error::InvalidCertificate(wrong)) => match wrong {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                    Some(format!("{path} has expired: issue a new certificate, or set the clock"))
                }
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Some(format!("{path} is not valid yet: is the clock right?"))
                }
                CertificateError::UnknownIssuer => {
                    let ca = self.ca.path.display();
                    Some(format!(
                        "{path} was not signed by the CA in {ca}; peers need the CA that did sign it"
                    ))
                }
                // Such as a certificate for servers alone, which is right for a gateway.
                _ => None,
            },
            _ => None,
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn tonic_identity(identity: &Identity) -> TonicIdentity {
    TonicIdentity::from_pem(&identity.cert.bytes, &identity.key.bytes)
}

/// All certificates of a file; at least one.
fn certificates(pem: &Pem) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem.bytes)
        .collect::<Result<_, _>>()
        .map_err(|cause| TlsError::wrong(&pem.path, format!("is not valid PEM: {cause}")))?;
    if found.is_empty() {
        let hint =
            if pem.mentions("PRIVATE KEY-----") { ", but a private key: is it the key's file?" } else { "" };
        return Err(TlsError::wrong(&pem.path, format!("has no certificate in it{hint}")));
    }
    for (index, der) in found.iter().enumerate() {
        ParsedCertificate::try_from(der).map_err(|cause| {
            TlsError::wrong(
                &pem.path,
                format!("has a certificate (number {}) that cannot be read: {cause}", index + 1),
            )
        })?;
    }
    Ok(found)
}

fn roots(ca: &Pem) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for der in certificates(ca)? {
        roots.add(der).map_err(|cause| {
            TlsError::wrong(&ca.path, format!("has a certificate that is no CA: {cause}"))
        })?;
    }
    Ok(roots)
}

fn check_identity(Identity { cert, key }: &Identity) -> Result<(), TlsError> {
    let chain = certificates(cert)?;
    let private = PrivateKeyDer::from_pem_slice(&key.bytes).map_err(|cause| {
        let wrong = if key.mentions("ENCRYPTED") {
            "is encrypted: write the key without a passphrase, readable by this process alone".to_owned()
        } else if key.mentions("-----BEGIN CERTIFICATE-----") {
            "has no private key in it, but a certificate: is it the certificate's file?".to_owned()
        } else {
            format!("has no private key in it ({cause})")
        };
        TlsError::wrong(&key.path, wrong)
    })?;
    match CertifiedKey::from_der(chain, private, &provider()) {
        Ok(_) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => Err(TlsError::wrong(
            &key.path,
            format!("is not the key of the certificate in {}", cert.path.display()),
        )),
        Err(cause) => Err(TlsError::wrong(&key.path, format!("has a key that cannot be used: {cause}"))),
    }
}

#[cfg(test)]
mod tests;
