//! TLS towards clients. Owns the reading of certificate and key; the rest is rustls.

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::settings::TlsFiles;

/// Reads the files; each mistake names its file.
pub fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, String> {
    let (certificates, key) = (files.certificates.display(), files.key.display());
    let chain: Vec<CertificateDer> = CertificateDer::pem_file_iter(&files.certificates)
        .and_then(Iterator::collect)
        .map_err(|error| format!("--tls-cert `{certificates}`: {error}"))?;
    if chain.is_empty() {
        return Err(format!("--tls-cert `{certificates}` holds no certificate in PEM"));
    }
    let secret = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|error| format!("--tls-key `{key}`: {error}"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .map_err(|error| format!("`{certificates}` and `{key}` do not fit: {error}"))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
