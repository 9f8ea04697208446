//! What the TLS listener shows its clients, and asks of them.

use crate::config::{ClientCertificates, TlsConf, TlsTexts};
use arc_swap::ArcSwap;
use pingora::listeners::tls::Acceptor;
use pingora::protocols::l4::stream::Stream as TcpStream;
use pingora::protocols::tls::TlsStream;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::sync::Arc;
use std::time::Duration;

/// HTTP/2 goes before HTTP/1.1.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The settings of the TLS listener, which may change while it listens: connections that stand go on with what they
/// were made with.
#[derive(Clone)]
pub struct Tls(Arc<ArcSwap<ServerConfig>>);

impl Tls {
    pub fn new(config: Arc<ServerConfig>) -> Self {
        Self(Arc::new(ArcSwap::new(config)))
    }

    pub fn set(&self, config: Arc<ServerConfig>) {
        self.0.store(config);
    }

    /// `None`: the client does not speak TLS as it must, or not in time.
    pub async fn handshake(&self, stream: TcpStream, within: Duration) -> Option<TlsStream<TcpStream>> {
        let acceptor = Acceptor::from_server_config(self.0.load_full());
        tokio::time::timeout(within, acceptor.tls_handshake(stream)).await.ok()?.ok()
    }
}

/// Makes the settings of the files.
///
/// # Errors
/// (setting, problem)
pub fn server_config(conf: &TlsConf, texts: &TlsTexts) -> Result<Arc<ServerConfig>, (&'static str, String)> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| ("tls", e.to_string()))?;
    let builder = match &texts.client_ca {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let verifier = client_verifier(pem, conf.client_certificates, provider);
            builder.with_client_cert_verifier(verifier.map_err(|e| ("tls.client_ca", e))?)
        }
    };
    let chain = certificates(&texts.own.certificate).map_err(|e| ("tls.certificate", e))?;
    let key = private_key(texts.own.key.reveal()).map_err(|e| ("tls.key", e.to_owned()))?;
    let mut config = builder.with_single_cert(chain, key).map_err(|_| {
        ("tls.key", "is not the key of tls.certificate, or of a kind that is not known".to_owned())
    })?;
    config.alpn_protocols = PROTOCOLS.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// Without the reason of the parser, which may cite the file.
fn private_key(pem: &str) -> Result<PrivateKeyDer<'static>, &'static str> {
    let is_encrypted = |line: &str| {
        line == "-----BEGIN ENCRYPTED PRIVATE KEY-----" || line.starts_with("Proc-Type: 4,ENCRYPTED")
    };
    match PrivateKeyDer::from_pem_slice(pem.as_bytes()) {
        Ok(key) => Ok(key),
        Err(_) if pem.lines().any(is_encrypted) => Err(
            "is encrypted, and nobody can be asked for its passphrase; decrypt it: openssl pkey -in FILE -out NEW",
        ),
        Err(_) if pem.contains("-----BEGIN CERTIFICATE-----") => {
            Err("holds a certificate and no private key; it is the other file that belongs here")
        }
        Err(_) => Err("is no private key in PEM"),
    }
}

fn client_verifier(
    pem: &str,
    asked: ClientCertificates,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|e| e.to_string())?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let builder = match asked {
        ClientCertificates::Required => builder,
        ClientCertificates::Optional => builder.allow_unauthenticated(),
    };
    builder.build().map(|verifier| verifier as _).map_err(|e| e.to_string())
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() && pem.contains("PRIVATE KEY-----") => {
            Err("holds a private key and no certificate; it is the other file that belongs here".to_owned())
        }
        Ok(certificates) if certificates.is_empty() => Err("holds no certificate in PEM".to_owned()),
        Ok(certificates) => Ok(certificates),
        Err(e) => Err(format!("is no PEM: {e}")),
    }
}
