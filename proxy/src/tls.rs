//! TLS, towards clients and towards servers. Owns the reading of certificates and keys; the rest is
//! rustls.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::settings::TlsFiles;

/// HTTP/1.1 is spoken on both sides.
const PROTOCOL: &[u8] = b"http/1.1";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Reads a PEM file of at least one certificate; each mistake names the option and the file.
fn certificates(option: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let shown = path.display();
    let chain: Vec<CertificateDer> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| format!("{option} `{shown}`: {error}"))?;
    if chain.is_empty() {
        return Err(format!("{option} `{shown}` holds no certificate in PEM"));
    }
    Ok(chain)
}

/// For clients: reads certificate and key.
pub fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, String> {
    let chain = certificates("--tls-cert", &files.certificates)?;
    let (shown, key) = (files.certificates.display(), files.key.display());
    let secret = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| format!("--tls-key `{key}`: {error}"))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(|error| format!("`{shown}` and `{key}` do not fit: {error}"))?;
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Whom the proxy believes to be a server behind TLS. Read when the first such server is named.
#[derive(Debug, Default)]
pub struct Trust {
    /// PEM file of certificates; the system's if there is none.
    pub file: Option<PathBuf>,
    read: OnceLock<Result<Connector, String>>,
}

/// [`TlsConnector`], with a name for logs.
#[derive(Clone)]
struct Connector(TlsConnector);

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Connector")
    }
}

impl Trust {
    /// Trusts the certificates of `file`, else those of the system.
    pub fn new(file: Option<PathBuf>) -> Self {
        Self { file, read: OnceLock::new() }
    }

    /// What connects to servers behind TLS.
    pub fn connector(&self) -> Result<TlsConnector, String> {
        let read = self.read.get_or_init(|| connector(self.file.as_deref()).map(Connector));
        read.clone().map(|connector| connector.0)
    }
}

fn connector(file: Option<&Path>) -> Result<TlsConnector, String> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(path) => {
            for certificate in certificates("--upstream-ca", path)? {
                let added = roots.add(certificate);
                added.map_err(|error| format!("--upstream-ca `{}`: {error}", path.display()))?;
            }
        }
        None => {
            // Certificates of the system that rustls cannot read are others' business.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err("this system has no trusted certificates: name those of the servers \
                            with --upstream-ca"
                    .to_owned());
            }
        }
    }
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![PROTOCOL.to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}
