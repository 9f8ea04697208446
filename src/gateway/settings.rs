//! The gateway settings that may change while the process runs.
//!
//! Every reader holds a clone of [`GatewaySettings`], so a reload replaces each setting once.

use super::api_key::ApiKeys;
use super::descriptors::{ConnectionLimits, Descriptors};
use super::tls::{Tls, server_config};
use super::upstream::pool::Upstreams;
use super::upstream::via::Pseudonym;
use crate::config::{AuthConf, Conf, HttpConf, Live, Secret, TlsConf, TlsTexts};
use parking_lot::Mutex;
use rustls::ServerConfig;
use std::sync::Arc;

/// The settings in force. Clones share them.
#[derive(Clone)]
pub struct GatewaySettings {
    pub http: Live<HttpConf>,
    /// The connection limits that `http.connections_max` and the file descriptors allow.
    pub room: Live<ConnectionLimits>,
    descriptors: Descriptors,
    pub auth: Live<AuthConf>,
    pub keys: Arc<ApiKeys>,
    pub upstreams: Upstreams,
    /// `None`: there is no TLS listener.
    pub tls: Option<Tls>,
    /// The configuration and files that `tls` was made from.
    tls_source: Arc<Mutex<Option<TlsSource>>>,
    /// The name of this fleet in `Via`.
    pub pseudonym: Arc<Pseudonym>,
}

type TlsSource = (TlsConf, TlsTexts);

fn tls_source(conf: &Conf) -> Option<TlsSource> {
    conf.tls.clone().zip(conf.tls_texts.clone())
}

/// (setting, problem)
type SettingProblem = (&'static str, String);

impl GatewaySettings {
    /// # Errors
    /// The files that `[tls]` names cannot be used.
    pub fn new(conf: &Conf, master: &Secret, pseudonym: Pseudonym) -> Result<Self, SettingProblem> {
        let descriptors = Descriptors::of_process();
        let room = descriptors.fit(conf);
        descriptors.report(conf, room);
        Ok(Self {
            http: Live::new(conf.http.clone()),
            room: Live::new(room),
            descriptors,
            auth: Live::new(conf.auth.clone()),
            keys: Arc::new(ApiKeys::new(master, &conf.keys, &conf.auth)),
            upstreams: Upstreams::new(&conf.upstreams),
            tls: tls_of(conf)?.map(Tls::new),
            tls_source: Arc::new(Mutex::new(tls_source(conf))),
            pseudonym: Arc::new(pseudonym),
        })
    }

    /// Puts new settings in force. They must have passed validation.
    pub fn set_conf(&self, conf: &Conf) {
        let room = self.descriptors.fit(conf);
        let configured = self.http.get().connections_max;
        if (configured, **self.room.get()) != (conf.http.connections_max, room) {
            self.descriptors.report(conf, room);
        }
        self.room.set(room);
        self.http.set(conf.http.clone());
        self.auth.set(conf.auth.clone());
        self.keys.set_conf(&conf.keys, &conf.auth);
        self.upstreams.set_conf(&conf.upstreams);
        let source = tls_source(conf);
        let mut before = self.tls_source.lock();
        // Replaced only if changed: rustls keeps TLS sessions with the settings, and clients resume them.
        if *before != source
            && let (Some(tls), Ok(Some(config))) = (&self.tls, tls_of(conf))
        {
            tls.set(config);
            *before = source;
        }
    }
}

/// The settings of the TLS listener. `None`: `[tls]` is not configured.
///
/// # Errors
/// The files cannot be used. Validation of the configuration calls this, so that it rejects such files.
pub fn tls_of(conf: &Conf) -> Result<Option<Arc<ServerConfig>>, SettingProblem> {
    let both = conf.tls.as_ref().zip(conf.tls_texts.as_ref());
    both.map(|(tls, texts)| server_config(tls, texts)).transpose()
}
