//! What of the edge changes while the process runs.

use super::api_key::ApiKeys;
use super::descriptors::{Descriptors, Room};
use super::guard::{Tls, server_config};
use super::upstreams::Upstreams;
use super::via::Pseudonym;
use crate::config::{AuthConf, Conf, HttpConf, Live, Secret, TlsConf, TlsTexts};
use parking_lot::Mutex;
use rustls::ServerConfig;
use std::sync::Arc;

/// The settings of the edge, shared by all who look at them.
#[derive(Clone)]
pub struct Edge {
    pub http: Live<HttpConf>,
    /// What of `http.connections_max` there are file descriptors for.
    pub room: Live<Room>,
    descriptors: Descriptors,
    pub auth: Live<AuthConf>,
    pub keys: Arc<ApiKeys>,
    pub upstreams: Upstreams,
    /// `None`: there is no such listener.
    pub tls: Option<Tls>,
    /// What `tls` was made of.
    tls_source: Arc<Mutex<Option<TlsSource>>>,
    /// What this fleet calls itself to upstreams.
    pub pseudonym: Arc<Pseudonym>,
}

type TlsSource = (TlsConf, TlsTexts);

fn tls_source(conf: &Conf) -> Option<TlsSource> {
    conf.tls.clone().zip(conf.tls_texts.clone())
}

/// (setting, problem)
type Problem = (&'static str, String);

impl Edge {
    /// # Errors
    /// The files that `[tls]` names cannot be used.
    pub fn new(conf: &Conf, master: &Secret, pseudonym: Pseudonym) -> Result<Self, Problem> {
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

    /// Puts other settings in force, which were checked.
    pub fn set_conf(&self, conf: &Conf) {
        let room = self.descriptors.fit(conf);
        let was_asked = self.http.get().connections_max;
        if (was_asked, **self.room.get()) != (conf.http.connections_max, room) {
            self.descriptors.report(conf, room);
        }
        self.room.set(room);
        self.http.set(conf.http.clone());
        self.auth.set(conf.auth.clone());
        self.keys.set_conf(&conf.keys, &conf.auth);
        self.upstreams.set_conf(&conf.upstreams);
        let source = tls_source(conf);
        let mut before = self.tls_source.lock();
        // Sessions are kept with the settings, so clients resume theirs as long as these stay.
        if *before != source
            && let (Some(tls), Ok(Some(config))) = (&self.tls, tls_of(conf))
        {
            tls.set(config);
            *before = source;
        }
    }
}

/// What the TLS listener is to show. Asked wherever settings are made, so that what cannot be used is refused.
pub fn tls_of(conf: &Conf) -> Result<Option<Arc<ServerConfig>>, Problem> {
    let both = conf.tls.as_ref().zip(conf.tls_texts.as_ref());
    both.map(|(tls, texts)| server_config(tls, texts)).transpose()
}
