//! The queue of the jobs, as spans name it.

use opentelemetry::KeyValue;

/// The destination of the messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    system: &'static str,
    /// The name of the queue.
    pub name: String,
    /// Host and port, for the span that calls it.
    server: Option<(String, u16)>,
    url: Option<String>,
}

impl Destination {
    /// A queue of SQS, from its URL, such as `https://sqs.eu-west-1.amazonaws.com/1/queue`.
    pub fn sqs(url: &str) -> Self {
        let url = url.trim_end_matches('/');
        let (scheme, rest) = url.split_once("://").unwrap_or(("https", url));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let port = if scheme == "http" { 80 } else { 443 };
        let name = path.rsplit('/').next().unwrap_or_default().to_owned();
        let server = Some(host_and_port(authority, port));
        // A password in it is not for the collector.
        let host = authority.rsplit('@').next().unwrap_or(authority);
        Self { system: "aws_sqs", name, server, url: Some(format!("{scheme}://{host}/{path}")) }
    }

    /// The queue of `dev`, in its own process. The conventions know no such system.
    pub fn embedded() -> Self {
        Self { system: "infra_embedded", name: "jobs".to_owned(), server: None, url: None }
    }

    /// The attributes of each span that has to do with a message.
    pub(super) fn attributes(&self, operation: &'static str) -> Vec<KeyValue> {
        let mut attributes = vec![
            KeyValue::new("messaging.system", self.system),
            KeyValue::new("messaging.destination.name", self.name.clone()),
            KeyValue::new("messaging.operation.name", operation),
            KeyValue::new("messaging.operation.type", operation),
        ];
        attributes.extend(self.url.clone().map(|url| KeyValue::new("aws.sqs.queue.url", url)));
        attributes
    }

    pub(super) fn server_attributes(&self) -> Vec<KeyValue> {
        let Some((host, port)) = &self.server else { return Vec::new() };
        vec![KeyValue::new("server.address", host.clone()), KeyValue::new("server.port", i64::from(*port))]
    }
}

/// Host and port of an authority. IPv6 addresses have no brackets in attributes.
pub(super) fn host_and_port(authority: &str, port_default: u16) -> (String, u16) {
    let authority = authority.rsplit('@').next().unwrap_or(authority);
    let end = authority.rfind(']').map_or(0, |at| at + 1);
    let (host, port) = match authority[end..].rfind(':') {
        Some(at) => (&authority[..end + at], authority[end + at + 1..].parse().ok()),
        None => (authority, None),
    };
    (host.trim_matches(['[', ']']).to_owned(), port.unwrap_or(port_default))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_is_named_by_its_url() {
        for (url, name, host, port) in [
            (
                "https://sqs.eu-west-1.amazonaws.com/1/jobs.fifo",
                "jobs.fifo",
                "sqs.eu-west-1.amazonaws.com",
                443,
            ),
            ("http://127.0.0.1:4566/000000000000/q/", "q", "127.0.0.1", 4566),
            ("http://[::1]:9/1/q", "q", "::1", 9),
            ("http://[::1]/1/q", "q", "::1", 80),
            ("https://u:p@h", "", "h", 443),
        ] {
            let queue = Destination::sqs(url);
            assert_eq!((queue.name.as_str(), queue.server), (name, Some((host.to_owned(), port))), "{url}");
        }
    }
}
