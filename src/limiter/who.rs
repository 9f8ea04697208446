//! The identities by which limits count; cheap to copy and to look up.

use crate::config::Identity;
use crate::model::FunctionId;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

/// The identity whose requests are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LimitIdentity {
    /// The name of an API key.
    Key(Arc<str>),
    /// The /64 prefix of an address; an IPv4 address in its IPv6-mapped form.
    Ip([u8; 16]),
    Function(FunctionId),
    Global,
    /// All identities beyond the bound on memory.
    Overflow,
}

impl LimitIdentity {
    pub fn ip(ip: IpAddr) -> Self {
        Self::Ip(match block_of(ip) {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        })
    }
}

/// The address block that counts as one client: an IPv6 host has at least a /64.
pub fn block_of(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// The form used in bucket names.
impl fmt::Display for LimitIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(name) => f.write_str(name),
            Self::Ip(bytes) => write!(f, "{}", Ipv6Addr::from(*bytes).to_canonical()),
            Self::Function(id) => f.write_str(id.as_str()),
            Self::Global => f.write_str("(all)"),
            Self::Overflow => f.write_str("(overflow)"),
        }
    }
}

/// The properties of a request when limits are counted.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// Known before the body is read.
    Caller { key_name: Option<&'a Arc<str>>, client: Option<IpAddr> },
    /// Known after the body is read.
    Function(&'a FunctionId),
}

impl Subject<'_> {
    /// The identity to count by, or `None` if the request has none of this kind.
    pub fn who(&self, identity: Identity) -> Option<LimitIdentity> {
        match (identity, self) {
            (Identity::Key, Self::Caller { key_name, .. }) => {
                key_name.map(|name| LimitIdentity::Key(Arc::clone(name)))
            }
            (Identity::Ip, Self::Caller { client, .. }) => client.map(LimitIdentity::ip),
            (Identity::Global, Self::Caller { .. }) => Some(LimitIdentity::Global),
            (Identity::Function, Self::Function(id)) => Some(LimitIdentity::Function((*id).clone())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_grouped_into_identities() {
        let name = Arc::from("a");
        let who = |ip: &str| {
            let subject = Subject::Caller { key_name: Some(&name), client: Some(ip.parse().unwrap()) };
            subject.who(Identity::Ip).unwrap()
        };
        assert_eq!(who("127.0.0.1"), who("::ffff:127.0.0.1"));
        assert_ne!(who("127.0.0.1"), who("127.0.0.2"));
        assert_eq!((who("127.0.0.1").to_string(), who("::1").to_string()), ("127.0.0.1".into(), "::".into()));
        assert_eq!(who("2001:db8:1:2:3:4:5:6"), who("2001:db8:1:2::"));
        assert_ne!(who("2001:db8:1:2::"), who("2001:db8:1:3::"));
        assert_eq!(Subject::Caller { key_name: Some(&name), client: None }.who(Identity::Ip), None);
        assert_eq!(Subject::Caller { key_name: None, client: None }.who(Identity::Key), None);
    }
}
