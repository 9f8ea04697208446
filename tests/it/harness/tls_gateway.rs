//! A gateway with a second listener, for HTTP/1.1 and HTTP/2 over TLS.

use super::gateway::{Conf, Gateway};
use super::platform::{Backend, Platform, Setup};
use super::tls::Authority;
use super::wait::{SOON, eventually};
use std::net::SocketAddr;

/// The name in the certificate.
pub const NAME: &str = "gateway.test";

const LISTENER: &str =
    "[tls]\nport = 0\naddress = \"127.0.0.1\"\ncertificate = \"certificate.pem\"\nkey = \"key.pem\"\n";

pub struct TlsGateway {
    pub platform: Platform,
    /// The issuer of the certificate.
    pub authority: Authority,
    /// The address of the TLS listener.
    pub addr: SocketAddr,
}

impl TlsGateway {
    /// `more` is the part of `server.toml` before `[tls]`; `tls` is added to `[tls]`.
    pub async fn start(tls: &str, more: &str, authority: Authority) -> Self {
        let conf = Conf { server: more.into(), ..Conf::default() };
        Self::start_with(conf, tls, authority).await
    }

    /// With other settings, to which `[tls]` is added.
    pub async fn start_with(mut conf: Conf, tls: &str, authority: Authority) -> Self {
        conf.server.push_str(LISTENER);
        conf.server.push_str(tls);
        let identity = authority.issue(NAME);
        conf.files = vec![
            ("certificate.pem".to_owned(), identity.certificate),
            ("key.pem".to_owned(), identity.key),
            ("clients.pem".to_owned(), authority.pem()),
        ];
        let platform = Setup::new(Backend::Dev).conf(conf).start().await;
        let port = eventually("the log line with the port", SOON, || async {
            let lines = platform.gateway.log();
            let line = lines.iter().find(|line| line["msg"] == "Listening for TLS");
            line.and_then(|line| line["port"].as_u64()).ok_or_else(|| "no line".to_owned())
        });
        let port = u16::try_from(port.await).expect("a port");
        Self { platform, authority, addr: SocketAddr::from(([127, 0, 0, 1], port)) }
    }

    pub fn gateway(&self) -> &Gateway {
        &self.platform.gateway
    }
}
