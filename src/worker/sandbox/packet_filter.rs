//! The packet filter of a network namespace with the network `public`: nftables, over netlink.
//!
//! Routes that lead nowhere were rejected. A socket that is bound to the interface (`SO_BINDTODEVICE`, which
//! needs no privilege) ignores them: the kernel then assumes that the destination is on the link. In this way
//! packets to 127.0.0.1 even leave the namespace, and slirp4netns sends them to the loopback of the host. A
//! filter on output sees each packet after all such decisions. The program cannot change it, because it has
//! no capability in the user namespace that owns the network.
//!
//! The messages are written here, because `nft` takes 6 ms of CPU time to do it, for every sandbox. To see
//! the rules of a sandbox: `nsenter --net=/proc/<pid>/ns/net nft list ruleset`.

use ipnet::Ipv4Net;
use nix::libc;
use std::net::Ipv4Addr;

/// Addresses that are not in the internet (RFC 6890 and the IANA registry): this network, private, carriers,
/// loopback, link-local with the instance-metadata service, protocols, documentation, relays, benchmarks, and
/// multicast with all above it. And the channel between Azure and its machines, whose number is public.
const NOT_PUBLIC: [(Ipv4Addr, u8); 15] = [
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];
const DNS_PORT: u16 = 53;

const TABLE: &str = "fence";
const CHAIN: &str = "output";

// Of linux/netlink.h, linux/netfilter/nfnetlink.h and linux/netfilter/nf_tables.h. The crate `libc` has only
// some of them.
const REQUEST: u16 = 0x1;
/// An error, or an acknowledgement, which is the error 0.
const REPLY: u16 = 2;
const ACK: u16 = 0x4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;
const NESTED: u16 = 0x8000;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NFTABLES: u16 = 10;
const NEW_TABLE: u16 = NFTABLES << 8;
const NEW_CHAIN: u16 = NFTABLES << 8 | 3;
const NEW_RULE: u16 = NFTABLES << 8 | 6;
/// IPv4 and IPv6.
const FAMILY_INET: u8 = 1;
const FAMILY_UNSPEC: u8 = 0;
const PROTOCOL_IPV4: u8 = 2;
const HOOK_LOCAL_OUT: u32 = 3;
const POLICY_DROP: u32 = 0;
const VERDICT_ACCEPT: u32 = 1;
const REGISTER_VERDICT: u32 = 0;
const REGISTER: u32 = 8;
const META_OIF: u32 = 5;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
const COMPARE_EQUAL: u32 = 0;
const COMPARE_UNEQUAL: u32 = 1;
const REJECT_ICMPX: u32 = 2;
const ICMPX_ADMIN_PROHIBITED: u8 = 3;
/// Offset and length of the destination address in a header of IPv4, and of the destination port in one of
/// TCP or UDP.
const DESTINATION: (u32, u32) = (16, 4);
const DESTINATION_PORT: (u32, u32) = (2, 2);
/// The loopback interface is the first one in each namespace.
const LOOPBACK_INDEX: u32 = 1;

/// A batch of netlink messages that sets the filter in the namespace of the socket.
#[derive(Debug)]
pub(super) struct PacketFilter {
    pub(super) messages: Vec<u8>,
    /// The number of the message whose acknowledgement means that the kernel has accepted all.
    last: u32,
}

/// What the kernel has said about a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BatchReply {
    Accepted,
    /// With this `errno`.
    Rejected(i32),
    Incomplete,
}

impl PacketFilter {
    /// Lets packets out to the internet only, and to port 53 of `resolvers`, which may be private.
    /// `own`: the addresses of this machine, public ones too.
    pub(super) fn public(resolvers: &[Ipv4Addr], own: &[Ipv4Addr]) -> Self {
        let accept = verdict(VERDICT_ACCEPT);
        let reject =
            expression("reject", &[number(1, REJECT_ICMPX), attribute(2, &[ICMPX_ADMIN_PROHIBITED])]);
        let mut rules = vec![
            // The loopback of the namespace itself.
            [meta(META_OIF), compare(COMPARE_EQUAL, &LOOPBACK_INDEX.to_ne_bytes()), accept.clone()].concat(),
            [meta(META_NFPROTO), compare(COMPARE_UNEQUAL, &[PROTOCOL_IPV4]), reject.clone()].concat(),
        ];
        for resolver in resolvers {
            for protocol in [libc::IPPROTO_UDP, libc::IPPROTO_TCP] {
                let protocol = u8::try_from(protocol).unwrap_or_default();
                let dns = [
                    payload(BASE_NETWORK, DESTINATION),
                    compare(COMPARE_EQUAL, &resolver.octets()),
                    meta(META_L4PROTO),
                    compare(COMPARE_EQUAL, &[protocol]),
                    payload(BASE_TRANSPORT, DESTINATION_PORT),
                    compare(COMPARE_EQUAL, &DNS_PORT.to_be_bytes()),
                    accept.clone(),
                ];
                rules.push(dns.concat());
            }
        }
        let own = own.iter().map(|address| Ipv4Net::from(*address));
        for net in not_public().chain(own) {
            let is_in = [
                payload(BASE_NETWORK, DESTINATION),
                mask(net.netmask()),
                compare(COMPARE_EQUAL, &net.network().octets()),
                reject.clone(),
            ];
            rules.push(is_in.concat());
        }
        rules.push(accept);
        Self::of(&rules)
    }

    /// The chain drops what no rule accepts.
    fn of(rules: &[Vec<u8>]) -> Self {
        let mut messages = message(BATCH_BEGIN, REQUEST, FAMILY_UNSPEC, 0, &[]);
        let hook = nested(4, &[number(1, HOOK_LOCAL_OUT), number(2, 0)]);
        let chain = [text(1, TABLE), text(3, CHAIN), hook, number(5, POLICY_DROP), text(7, "filter")];
        let mut last = 2;
        messages.extend(message(NEW_TABLE, REQUEST | CREATE, FAMILY_INET, 1, &text(1, TABLE)));
        messages.extend(message(NEW_CHAIN, REQUEST | CREATE, FAMILY_INET, last, &chain.concat()));
        for (at, rule) in rules.iter().enumerate() {
            last += 1;
            let ack = if at + 1 == rules.len() { ACK } else { 0 };
            let body = [text(1, TABLE), text(2, CHAIN), attribute(4 | NESTED, rule)].concat();
            messages.extend(message(NEW_RULE, REQUEST | CREATE | APPEND | ack, FAMILY_INET, last, &body));
        }
        messages.extend(message(BATCH_END, REQUEST, FAMILY_UNSPEC, last + 1, &[]));
        Self { messages, last }
    }

    /// Reads the replies in one datagram. Allocates nothing.
    pub(super) fn read_replies(&self, datagram: &[u8]) -> BatchReply {
        let word = |at: usize| -> Option<[u8; 4]> { datagram.get(at..at + 4)?.try_into().ok() };
        let mut at = 0;
        while let (Some(length), Some(kind), Some(sequence)) = (word(at), word(at + 4), word(at + 8)) {
            let is_reply = u16::from_ne_bytes([kind[0], kind[1]]) == REPLY;
            if is_reply && let Some(error) = word(at + 16).map(i32::from_ne_bytes) {
                if error != 0 {
                    return BatchReply::Rejected(-error);
                }
                if u32::from_ne_bytes(sequence) == self.last {
                    return BatchReply::Accepted;
                }
            }
            let length = u32::from_ne_bytes(length) as usize;
            at += length.max(16).next_multiple_of(4);
        }
        BatchReply::Incomplete
    }
}

fn not_public() -> impl Iterator<Item = Ipv4Net> {
    NOT_PUBLIC.into_iter().filter_map(|(address, prefix)| Ipv4Net::new(address, prefix).ok())
}

/// `struct nlmsghdr`, `struct nfgenmsg`, and the attributes.
fn message(kind: u16, flags: u16, family: u8, sequence: u32, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(20 + attributes.len()).unwrap_or(u32::MAX);
    // The subsystem of a batch is its resource id.
    let resource = if kind == BATCH_BEGIN || kind == BATCH_END { NFTABLES } else { 0 };
    let mut bytes = Vec::with_capacity(20 + attributes.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(attributes);
    bytes
}

/// `struct nlattr`, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = Vec::with_capacity(4 + value.len().next_multiple_of(4));
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &attributes.concat())
}

fn number(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

/// An expression of a rule: an element of the list with a name and data.
fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[text(1, name), nested(2, data)])
}

/// Loads a fact about the packet.
fn meta(key: u32) -> Vec<u8> {
    expression("meta", &[number(1, REGISTER), number(2, key)])
}

/// Loads bytes of a header.
fn payload(base: u32, (offset, length): (u32, u32)) -> Vec<u8> {
    expression("payload", &[number(1, REGISTER), number(2, base), number(3, offset), number(4, length)])
}

/// Keeps the bits of a network.
fn mask(netmask: Ipv4Addr) -> Vec<u8> {
    let (mask, xor) = (attribute(1, &netmask.octets()), attribute(1, &[0; 4]));
    let registers = [number(1, REGISTER), number(2, REGISTER), number(3, 4)];
    expression("bitwise", &[registers.concat(), nested(4, &[mask]), nested(5, &[xor])])
}

/// Ends the rule unless the loaded value compares.
fn compare(operator: u32, value: &[u8]) -> Vec<u8> {
    let data = nested(3, &[attribute(1, value)]);
    expression("cmp", &[number(1, REGISTER), number(2, operator), data])
}

fn verdict(code: u32) -> Vec<u8> {
    let verdict = nested(2, &[number(1, code)]);
    expression("immediate", &[number(1, REGISTER_VERDICT), nested(2, &[verdict])])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The types and numbers of the messages.
    fn headers(filter: &PacketFilter) -> Vec<(u16, u32)> {
        let (mut at, mut found) = (0, Vec::new());
        while at < filter.messages.len() {
            let header = &filter.messages[at..at + 16];
            let length = u32::from_ne_bytes(header[..4].try_into().unwrap()) as usize;
            let kind = u16::from_ne_bytes(header[4..6].try_into().unwrap());
            found.push((kind, u32::from_ne_bytes(header[8..12].try_into().unwrap())));
            assert_eq!(length % 4, 0);
            at += length;
        }
        found
    }

    #[test]
    fn a_batch_has_a_rule_for_each_network() {
        let resolver = Ipv4Addr::new(10, 0, 0, 2);
        for (resolvers, own, rules) in [(vec![], vec![], 18), (vec![resolver], vec![resolver; 2], 22)] {
            let filter = PacketFilter::public(&resolvers, &own);
            let mut expected = vec![(BATCH_BEGIN, 0), (NEW_TABLE, 1), (NEW_CHAIN, 2)];
            expected.extend((3..3 + rules).map(|number| (NEW_RULE, number)));
            expected.push((BATCH_END, 3 + rules));
            assert_eq!((headers(&filter), filter.last), (expected, 2 + rules));
        }
    }

    #[test]
    fn messages_are_as_the_kernel_defines_them() {
        // The second rule as `nft` sends it: `meta nfproto != ipv4`.
        let compared = [meta(META_NFPROTO), compare(COMPARE_UNEQUAL, &[PROTOCOL_IPV4])].concat();
        let expected: Vec<u8> = [
            &[36, 0, 1, 128, 9, 0, 1, 0][..],
            b"meta\0\0\0\0",
            &[20, 0, 2, 128, 8, 0, 1, 0, 0, 0, 0, 8, 8, 0, 2, 0, 0, 0, 0, 15],
            &[44, 0, 1, 128, 8, 0, 1, 0],
            b"cmp\0",
            &[32, 0, 2, 128, 8, 0, 1, 0, 0, 0, 0, 8, 8, 0, 2, 0, 0, 0, 0, 1],
            &[12, 0, 3, 128, 5, 0, 1, 0, 2, 0, 0, 0],
        ]
        .concat();
        if cfg!(target_endian = "little") {
            assert_eq!(compared, expected);
        }
    }

    #[test]
    fn networks_that_are_not_public_are_the_registered_ones() {
        let is_public = |address: &str| {
            let address: Ipv4Addr = address.parse().unwrap();
            !not_public().any(|net| net.contains(&address))
        };
        assert_eq!(not_public().count(), NOT_PUBLIC.len());
        for address in ["1.1.1.1", "9.255.255.255", "172.15.0.1", "172.32.0.1", "100.128.0.1"] {
            assert!(is_public(address), "{address}");
        }
        for address in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.53",
            "169.254.169.254",
            "172.31.255.255",
            "192.168.1.1",
            "198.19.255.3",
            "224.0.0.251",
            "240.0.0.1",
            "255.255.255.255",
        ] {
            assert!(!is_public(address), "{address}");
        }
    }

    /// A message of the kernel about the message `sequence`.
    fn reply(kind: u16, sequence: u32, error: i32) -> Vec<u8> {
        let mut bytes = message(kind, 0, 0, sequence, &[0; 16]);
        bytes[16..20].copy_from_slice(&error.to_ne_bytes());
        bytes
    }

    #[test]
    fn replies_are_read_to_the_last_one() {
        let filter = PacketFilter::public(&[], &[]);
        let (ok, last) = (reply(2, 1, 0), reply(2, filter.last, 0));
        for (datagram, expected) in [
            (vec![], BatchReply::Incomplete),
            (ok.clone(), BatchReply::Incomplete),
            (last.clone(), BatchReply::Accepted),
            ([ok.clone(), last.clone()].concat(), BatchReply::Accepted),
            ([ok, reply(2, 2, -libc::EPERM), last.clone()].concat(), BatchReply::Rejected(libc::EPERM)),
            (reply(3, filter.last, 0), BatchReply::Incomplete),
            (last[..18].to_vec(), BatchReply::Incomplete),
            (vec![0; 64], BatchReply::Incomplete),
        ] {
            assert_eq!(filter.read_replies(&datagram), expected, "{datagram:?}");
        }
    }
}
