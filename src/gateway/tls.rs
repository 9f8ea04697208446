//! The settings of the TLS listener: certificate, client certificates, protocols. Replaced at a reload.

use crate::config::{ClientCertificates, Conf, TlsConf, TlsTexts};
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
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

/// Protocols for ALPN, the preferred one first.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The settings of the TLS listener. They may change while it listens; established connections keep the old
/// ones.
#[derive(Clone)]
pub struct Tls(Arc<ArcSwap<ServerConfig>>);

impl Tls {
    pub fn new(config: Arc<ServerConfig>) -> Self {
        Self(Arc::new(ArcSwap::new(config)))
    }

    pub fn set(&self, config: Arc<ServerConfig>) {
        self.0.store(config);
    }

    /// `None`: the handshake failed, or did not complete within `within`.
    pub async fn handshake(&self, stream: TcpStream, within: Duration) -> Option<TlsStream<TcpStream>> {
        let acceptor = Acceptor::from_server_config(self.0.load_full());
        tokio::time::timeout(within, acceptor.tls_handshake(stream)).await.ok()?.ok()
    }
}

/// Builds the settings from the files.
///
/// # Errors
/// (name of the setting, problem): a file cannot be used.
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
        ("tls.key", "does not match tls.certificate, or its type is not supported".to_owned())
    })?;
    config.alpn_protocols = PROTOCOLS.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// When the first certificate of each file expires: (`file` of the metrics, Unix seconds). Empty without
/// `[tls]`, and without a file none of whose dates can be read.
pub fn certificate_ends(conf: &Conf) -> Vec<(&'static str, i64)> {
    let Some(texts) = &conf.tls_texts else { return Vec::new() };
    let own = ("certificate", Some(&texts.own.certificate));
    let files = [own, ("client_ca", texts.client_ca.as_ref())];
    files.into_iter().filter_map(|(file, pem)| Some((file, first_end(pem?)?))).collect()
}

/// When the first of these certificates expires, in Unix seconds.
fn first_end(pem: &str) -> Option<i64> {
    let end_of = |certificate: CertificateDer<'_>| {
        let (_, certificate) = X509Certificate::from_der(&certificate).ok()?;
        Some(certificate.validity().not_after.timestamp())
    };
    certificates(pem).ok()?.into_iter().filter_map(end_of).min()
}

/// The errors omit the parser's reason, which may quote the key.
fn private_key(pem: &str) -> Result<PrivateKeyDer<'static>, &'static str> {
    let is_encrypted = |line: &str| {
        line == "-----BEGIN ENCRYPTED PRIVATE KEY-----" || line.starts_with("Proc-Type: 4,ENCRYPTED")
    };
    match PrivateKeyDer::from_pem_slice(pem.as_bytes()) {
        Ok(key) => Ok(key),
        Err(_) if pem.lines().any(is_encrypted) => {
            Err("is encrypted, which is not supported; decrypt it: openssl pkey -in FILE -out NEW")
        }
        Err(_) if pem.contains("-----BEGIN CERTIFICATE-----") => {
            Err("contains a certificate instead of a private key; the two files may be swapped")
        }
        Err(_) => Err("contains no PEM private key"),
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
            Err("contains a private key instead of a certificate; the two files may be swapped".to_owned())
        }
        Ok(certificates) if certificates.is_empty() => Err("contains no PEM certificate".to_owned()),
        Ok(certificates) => Ok(certificates),
        Err(e) => Err(format!("is not valid PEM: {e}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    fn pem(end: i32) -> String {
        let mut params = CertificateParams::new(vec!["gateway.test".to_owned()]).unwrap();
        params.not_after = date_time_ymd(end, 1, 1);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
    }

    #[test]
    fn the_first_end_of_a_chain_is_found() {
        let chain = format!("{}{}{}", pem(2040), pem(2030), pem(2050));
        assert_eq!(first_end(&chain), Some(1_893_456_000));
        assert_eq!(first_end(&pem(2060)), Some(2_840_140_800));
        for other in ["", "text", &KeyPair::generate().unwrap().serialize_pem()] {
            assert_eq!(first_end(other), None);
        }
        assert_eq!(certificate_ends(&Conf::shipped().unwrap()), [], "no TLS");
    }
}
