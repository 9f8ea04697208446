//! How many connections there are, in all and of one address, and whether there may be one more.

use crate::limiter::block_of;
use dashmap::DashMap;
use prometheus::IntGauge;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Connections beyond the cap that are let in all the same, to be answered: health and metrics as always, others 503.
const RESERVE: usize = 128;

pub struct Census {
    connections: AtomicUsize,
    gauge: IntGauge,
    /// By address, or /64 of IPv6; only while there is a cap by address.
    by_block: DashMap<IpAddr, usize>,
}

/// One connection; gives its place back when dropped.
pub struct Place {
    census: Arc<Census>,
    block: Option<IpAddr>,
    /// There is room for it only to be told so.
    pub is_reserve: bool,
}

/// Most connections, in all and of one address; 0: no cap.
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    pub all: usize,
    pub one: usize,
}

impl Census {
    pub fn new(gauge: IntGauge) -> Self {
        Self { connections: AtomicUsize::new(0), gauge, by_block: DashMap::new() }
    }

    /// A place for a connection from `client`, whom the cap by address spares if it is `None`. `None`: there is no room
    /// even for a refusal.
    pub fn enter(self: &Arc<Self>, client: Option<IpAddr>, caps: Caps) -> Option<Place> {
        let before = self.connections.fetch_add(1, Ordering::Relaxed);
        self.gauge.inc();
        let mut place = Place { census: Arc::clone(self), block: None, is_reserve: before >= caps.all };
        if before >= caps.all.saturating_add(RESERVE) {
            return None;
        }
        if let (Some(client), 1..) = (client, caps.one) {
            let block = block_of(client);
            let mut count = self.by_block.entry(block).or_default();
            *count += 1;
            let of_block = *count;
            drop(count);
            place.block = Some(block);
            if of_block > caps.one {
                // One address may not take the whole reserve either.
                place.is_reserve = true;
                return (of_block <= caps.one + 1).then_some(place);
            }
        }
        Some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.census.connections.fetch_sub(1, Ordering::Relaxed);
        self.census.gauge.dec();
        if let Some(block) = self.block {
            self.census.by_block.remove_if_mut(&block, |_, count| {
                *count -= 1;
                *count == 0
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_given_back() {
        let census = Arc::new(Census::new(IntGauge::new("connections", "open").unwrap()));
        let caps = Caps { all: 2, one: 0 };
        let places: Vec<_> = (0..2 + RESERVE).map(|_| census.enter(None, caps).unwrap()).collect();
        assert_eq!(places.iter().filter(|place| place.is_reserve).count(), RESERVE);
        assert!(census.enter(None, caps).is_none());
        drop(places);
        assert_eq!((census.connections.load(Ordering::Relaxed), census.gauge.get()), (0, 0));
        assert!(!census.enter(None, caps).unwrap().is_reserve);
    }

    #[test]
    fn one_address_has_a_cap_of_its_own() {
        let census = Arc::new(Census::new(IntGauge::new("connections", "open").unwrap()));
        let caps = Caps { all: 100, one: 2 };
        let enter = |ip: &str| census.enter(Some(ip.parse().unwrap()), caps);
        let first = (enter("2001:db8::1").unwrap(), enter("2001:db8::2").unwrap());
        let told = enter("2001:db8::3").unwrap();
        assert!(!first.0.is_reserve && !first.1.is_reserve && told.is_reserve);
        assert!(enter("2001:db8::4").is_none());
        assert!(!enter("2001:db8:0:1::1").unwrap().is_reserve, "another /64");
        assert!(!enter("10.0.0.1").unwrap().is_reserve);
        drop((first, told));
        assert!(!enter("2001:db8::4").unwrap().is_reserve);
        assert!(census.by_block.is_empty());
    }
}
