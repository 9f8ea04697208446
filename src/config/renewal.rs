//! Decides which parts of a changed `conf/` are applied.
//!
//! Each part is applied by itself, so that a mistake in one part does not block another. Above all, it must
//! not keep a removed key in force. Parts that depend on each other are applied together or not at all:
//!
//! * `[tls]` of `server.toml` names the certificates. As long as `[tls]` does not change, they are
//!   independent.
//! * A limit may name an upstream. A new upstream waits for a valid `limits.toml`, because that file may
//!   limit it. Limits wait for `upstreams.toml` only if they name an upstream, or if the limits in force do.
//!
//! A rejected part is tried again with each change, because it may be valid together with the new parts.

use super::{Conf, ConfPart, ConfTexts, ConfigError};
use std::collections::BTreeMap;

/// The outcome of a reload.
#[derive(Debug)]
pub struct ConfReload {
    /// The texts in force after the reload.
    pub texts: ConfTexts,
    pub conf: Conf,
    /// The changed parts that were rejected, with the reasons.
    pub refused: BTreeMap<ConfPart, Vec<String>>,
}

const TLS_PARTS: [ConfPart; 3] = [ConfPart::Server, ConfPart::Certificate, ConfPart::ClientCa];
const ROUTE_PARTS: [ConfPart; 2] = [ConfPart::Upstreams, ConfPart::Limits];

impl ConfReload {
    /// Applies the valid parts of `read` to the settings in force, `texts` and `conf`. `make` parses texts.
    pub fn new(
        (texts, conf): (ConfTexts, Conf),
        read: &ConfTexts,
        make: impl Fn(&ConfTexts) -> Result<Conf, ConfigError>,
    ) -> Self {
        let mut trial = ReloadAttempt { texts, conf, read, make, refused: BTreeMap::new() };
        trial.take_each(&[ConfPart::Keys, ConfPart::Worker]);
        // If server.toml is missing or not TOML, the certificates were read from the paths in force.
        if trial.read.has_same_tls(&trial.texts) || !trial.read.has_tables(ConfPart::Server) {
            trial.take_each(&TLS_PARTS);
        } else {
            trial.take_all(&TLS_PARTS);
        }
        trial.take_routes();
        Self { texts: trial.texts, conf: trial.conf, refused: trial.refused }
    }
}

/// Settings to which valid parts are applied one by one.
struct ReloadAttempt<'a, F> {
    texts: ConfTexts,
    conf: Conf,
    read: &'a ConfTexts,
    make: F,
    refused: BTreeMap<ConfPart, Vec<String>>,
}

impl<F: Fn(&ConfTexts) -> Result<Conf, ConfigError>> ReloadAttempt<'_, F> {
    fn changed(&self, parts: &[ConfPart]) -> Vec<ConfPart> {
        parts.iter().copied().filter(|part| !self.read.is_same(*part, &self.texts)).collect()
    }

    /// The settings in force with these parts replaced. The error lists every problem.
    fn with(&self, parts: &[ConfPart]) -> Result<(ConfTexts, Conf), Vec<String>> {
        let problems: Vec<_> = parts.iter().flat_map(|part| self.read.problems(*part)).collect();
        if !problems.is_empty() {
            return Err(problems);
        }
        let texts = parts.iter().fold(self.texts.clone(), |texts, part| texts.with(*part, self.read));
        let conf = (self.make)(&texts).map_err(|ConfigError(problems)| problems)?;
        let lost: Vec<_> = parts.iter().filter_map(|part| self.read.lost_since(*part, &self.texts)).collect();
        if lost.is_empty() { Ok((texts, conf)) } else { Err(lost) }
    }

    fn take_each(&mut self, parts: &[ConfPart]) {
        for part in self.changed(parts) {
            match self.with(&[part]) {
                Ok(taken) => (self.texts, self.conf) = taken,
                Err(problems) => drop(self.refused.insert(part, problems)),
            }
        }
    }

    /// Applies all of the changed parts, or none.
    fn take_all(&mut self, parts: &[ConfPart]) {
        let changed = self.changed(parts);
        match self.with(&changed) {
            Ok(taken) => (self.texts, self.conf) = taken,
            Err(problems) => self.refuse(&changed, &problems),
        }
    }

    /// Applies the upstreams and the limits together, or else the limits alone if they name no upstream.
    fn take_routes(&mut self) {
        let changed = self.changed(&ROUTE_PARTS);
        let problems = match self.with(&changed) {
            Ok(taken) => {
                (self.texts, self.conf) = taken;
                return;
            }
            Err(problems) => problems,
        };
        if changed.len() > 1
            && let Ok(taken) = self.with(&[ConfPart::Limits])
            && !self.conf.limits_upstreams()
            && !taken.1.limits_upstreams()
        {
            (self.texts, self.conf) = taken;
            self.refuse(&[ConfPart::Upstreams], &problems);
        } else {
            self.refuse(&changed, &problems);
        }
    }

    /// Records the problems of each part, or that it waits for the others.
    fn refuse(&mut self, parts: &[ConfPart], problems: &[String]) {
        for part in parts {
            let name = self.read.name(*part);
            let is_own = |problem: &&String| parts.len() == 1 || problem.starts_with(name);
            let mut own: Vec<_> = problems.iter().filter(is_own).cloned().collect();
            if own.is_empty() {
                let others: Vec<_> =
                    parts.iter().filter(|other| *other != part).map(|part| self.read.name(*part)).collect();
                own.push(format!(
                    "{name}: is applied only together with {}, which cannot be used",
                    others.join(", ")
                ));
            }
            self.refused.insert(*part, own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::files::ConfText;

    const KEY: &str = "[[key]]\nname = \"a\"\n\
        sha256 = \"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08\"\nscopes = [\"run\"]\n";
    const NO_KEY: &str = "key = []\n";
    const WRONG: &str = "x = 1\n";
    const NO_TOML: &str = "[[\n";
    const UP: &str =
        "[[upstream]]\nname = \"u\"\nprefix = \"/u\"\naddresses = [\"127.0.0.1:1\"]\nscope = \"none\"\n";
    const NO_UP: &str = "upstream = []\n";
    const TLS: &str = "[tls]\nport = 1\ncertificate = \"c\"\nkey = \"k\"\n";

    fn limit(route: &str, rate: u32) -> String {
        format!(
            "[[limit]]\nname = \"a\"\nidentity = \"ip\"\nroutes = [{route:?}]\nrate = {rate}\nperiod_s = 1\n\
             burst = 1\non_redis_loss = \"local\"\n"
        )
    }

    fn texts(parts: &[(ConfPart, &str)]) -> ConfTexts {
        let mut texts = ConfTexts::none();
        for (part, text) in parts {
            let text = (*text).to_owned();
            let pem = super::super::files::CertificateText {
                certificate: text.clone(),
                key: super::super::Secret::new(text.clone()),
            };
            let file = |name: &str| ConfText { name: name.to_owned(), text: Ok(Some(text.clone())) };
            match part {
                ConfPart::Server => texts.server = file("server.toml"),
                ConfPart::Limits => texts.limits = file("limits.toml"),
                ConfPart::Keys => texts.keys = file("keys.toml"),
                ConfPart::Upstreams => texts.upstreams = file("upstreams.toml"),
                ConfPart::Worker => texts.worker = file("worker.toml"),
                ConfPart::Certificate => texts.certificate = Ok(Some(pem)),
                ConfPart::ClientCa => texts.client_ca = Ok(Some(text.clone())),
            }
        }
        texts
    }

    /// Parses as the start and the reload loop do. The certificate "bad" is not valid.
    fn make(texts: &ConfTexts) -> Result<Conf, ConfigError> {
        let conf = Conf::of(texts)?;
        conf.check_routes(texts, |_| false, |route| route == "/run")?;
        let is_bad = |text: &str| text == "bad";
        match &conf.tls_texts {
            Some(tls) if is_bad(&tls.own.certificate) => Err(texts.of_server("tls.certificate", "is bad")),
            Some(tls) if tls.client_ca.as_deref().is_some_and(is_bad) => {
                Err(texts.of_server("tls.client_ca", "is bad"))
            }
            _ => Ok(conf),
        }
    }

    /// Exactly the named parts of a change are applied. All other changed parts are rejected with a reason.
    #[test]
    fn each_part_is_applied_unless_a_part_it_depends_on_is_rejected() {
        use ConfPart::{Certificate, ClientCa, Keys, Limits, Server, Upstreams, Worker};
        let (run_1, run_2) = (limit("/run", 1), limit("/run", 2));
        let (on_u, on_u_2) = (limit("/u/*", 1), limit("/u/*", 2));
        let auth = "[auth]\nfailures_burst = 7\n";
        let (tls_auth, tls_moved) = (format!("{TLS}{auth}"), TLS.replace("\"c\"", "\"d\""));
        let base = [(Keys, KEY), (Limits, &*run_1), (Upstreams, NO_UP), (Server, TLS)];
        let base = [&base[..], &[(Certificate, "one"), (ClientCa, "one")]].concat();
        let limited = [(Upstreams, UP), (Limits, &*on_u)];
        let every_part = [(Keys, NO_KEY), (Limits, &*run_2), (Upstreams, UP), (Server, auth)];
        type Parts<'a> = &'a [(ConfPart, &'a str)];
        let cases: [(Parts<'_>, Parts<'_>, &[ConfPart]); 24] = [
            // In force in addition to the base; the change; the parts of it that are applied.
            (&[], &every_part, &[Keys, Limits, Upstreams, Server]),
            // A removed key is never kept in force by mistakes in other parts.
            (&[], &[(Keys, NO_KEY), (Upstreams, WRONG)], &[Keys]),
            (&[], &[(Keys, NO_KEY), (Upstreams, NO_TOML), (Limits, NO_TOML), (Server, NO_TOML)], &[Keys]),
            (&[], &[(Keys, NO_KEY), (Certificate, "bad"), (ClientCa, "bad"), (Server, WRONG)], &[Keys]),
            // Mistakes in the keys do not block other parts.
            (
                &[],
                &[(Keys, WRONG), (Limits, &run_2), (Upstreams, UP), (Server, &tls_auth)],
                &[Limits, Upstreams, Server],
            ),
            (&[], &[(Keys, ""), (Limits, &run_2)], &[Limits]),
            // The worker is independent of everything else.
            (&[], &[(Worker, "[warm]\nidle_s = 9\n"), (Keys, WRONG), (Server, NO_TOML)], &[Worker]),
            (&[], &[(Worker, WRONG), (Limits, &run_2)], &[Limits]),
            // Limits that name no upstream do not need upstreams.toml.
            (&[], &[(Limits, &run_2), (Upstreams, WRONG)], &[Limits]),
            (&[], &[(Limits, &on_u), (Upstreams, UP)], &[Limits, Upstreams]),
            (&[], &[(Limits, &on_u), (Upstreams, WRONG)], &[]),
            (&[], &[(Limits, &on_u)], &[]),
            (&limited, &[(Limits, &on_u_2), (Upstreams, WRONG)], &[]),
            (&limited, &[(Limits, &run_1), (Upstreams, WRONG)], &[]),
            (&limited, &[(Limits, &run_1), (Upstreams, NO_UP)], &[Limits, Upstreams]),
            (&limited, &[(Upstreams, NO_UP)], &[]),
            // A new upstream waits for the limits, which may name it.
            (&[], &[(Upstreams, UP), (Limits, NO_TOML)], &[]),
            (&[], &[(Upstreams, UP), (Limits, "[waits]\nsync_max_s = 5\n")], &[]),
            (&[], &[(Upstreams, UP)], &[Upstreams]),
            // While [tls] does not change, the certificates wait neither for other keys of the file nor for
            // each other.
            (&[], &[(Server, &tls_auth), (Certificate, "bad"), (ClientCa, "two")], &[Server, ClientCa]),
            (&[], &[(Server, NO_TOML), (Certificate, "two"), (ClientCa, "bad")], &[Certificate]),
            (&[], &[(Server, WRONG), (Certificate, "two")], &[]),
            (&[], &[(Server, &tls_moved), (Certificate, "bad"), (ClientCa, "two"), (Keys, NO_KEY)], &[Keys]),
            (
                &[],
                &[(Server, &tls_moved), (Certificate, "two"), (ClientCa, "two")],
                &[Server, Certificate, ClientCa],
            ),
        ];
        for (more, changes, taken) in cases {
            let before = texts(&[&base[..], more].concat());
            let read = texts(&[&base[..], more, changes].concat());
            let conf = make(&before).unwrap();
            let renewal = ConfReload::new((before.clone(), conf.clone()), &read, make);
            let case = format!("{changes:?}: {:#?}", renewal.refused);
            for part in ConfPart::ALL {
                let is_changed = changes.iter().any(|(changed, _)| *changed == part);
                let is_taken = taken.contains(&part);
                let expected = if is_taken { &read } else { &before };
                assert!(renewal.texts.is_same(part, expected), "{part:?}, {case}");
                assert_eq!(renewal.refused.contains_key(&part), is_changed && !is_taken, "{part:?}, {case}");
                assert!(renewal.refused.get(&part).is_none_or(|problems| !problems.is_empty()), "{case}");
            }
            assert_eq!(Ok(renewal.conf), make(&renewal.texts), "{case}");
        }
    }

    #[test]
    fn each_rejection_names_its_own_file() {
        let before = texts(&[(ConfPart::Limits, &limit("/run", 1)), (ConfPart::Upstreams, NO_UP)]);
        let refused = |changes: &[(ConfPart, &str)]| {
            let read = changes
                .iter()
                .fold(before.clone(), |all, (part, text)| all.with(*part, &texts(&[(*part, text)])));
            let renewal = ConfReload::new((before.clone(), make(&before).unwrap()), &read, make);
            renewal.refused.into_values().flatten().collect::<Vec<_>>()
        };
        let on_u = limit("/u/*", 1);
        assert_eq!(
            refused(&[(ConfPart::Limits, &on_u), (ConfPart::Upstreams, WRONG)]),
            [
                "limits.toml: is applied only together with upstreams.toml, which cannot be used",
                "upstreams.toml:1: x unknown field `x`, expected `upstream`"
            ]
        );
        assert_eq!(refused(&[(ConfPart::Limits, "")]), ["limits.toml: the file is empty"]);
        let mut unread = before.clone();
        unread.refuse(ConfPart::Keys, "is a FIFO");
        let renewal = ConfReload::new((before.clone(), make(&before).unwrap()), &unread, make);
        assert_eq!(renewal.refused[&ConfPart::Keys], ["conf/keys.toml: is a FIFO"]);
        assert_eq!(renewal.refused.len(), 1);
    }
}
