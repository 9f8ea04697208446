//! Counts connections, in total and by client address, and enforces the limits.
//!
//! Beyond the total limit a small reserve of connections is accepted to send a response: health checks and
//! metrics are served, other requests get a 503. Silent connections must not block the reserve, so they are
//! evicted.

use crate::limiter::block_of;
use dashmap::DashMap;
use parking_lot::Mutex;
use prometheus::IntGauge;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout};

/// The counters of all listeners.
pub struct ConnectionCounter {
    connections: AtomicUsize,
    gauge: IntGauge,
    /// Connections by IPv4 address or IPv6 /64 prefix. Counted only while a limit by address is configured.
    by_block: DashMap<IpAddr, usize>,
    reserve: Mutex<Reserve>,
    /// Notified when a connection of the reserve ends.
    one_ended: Notify,
}

/// The connections of the reserve that have not yet sent a request that is always answered. By number, oldest
/// first.
///
/// They can be evicted, so that silent clients, which cost an attacker little, do not keep health checks out.
#[derive(Default)]
struct Reserve {
    next: u64,
    idle: BTreeMap<u64, (Instant, oneshot::Sender<()>)>,
}

/// How long a connection of the reserve may stay idle before it can be evicted.
const GRACE: Duration = Duration::from_millis(250);
/// How often a waiter for room checks whether a connection can be evicted.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One registered connection. Dropping it frees its slot.
pub struct ConnectionSlot {
    census: Arc<ConnectionCounter>,
    block: Option<IpAddr>,
    /// Accepted beyond the limit, only to be answered.
    pub is_reserve: bool,
    /// Its key among the idle connections of the reserve.
    number: Option<u64>,
    evicted: Option<oneshot::Receiver<()>>,
}

/// The limits on connections: in total, in the reserve beyond that, and of one address (0: unlimited).
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    pub all: usize,
    pub reserve: usize,
    pub one: usize,
}

/// How a connection was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    Usually,
    /// On a spare descriptor that was held back. The connection must end soon to free it.
    OnSpare,
}

impl ConnectionCounter {
    pub fn new(gauge: IntGauge) -> Self {
        Self {
            connections: AtomicUsize::new(0),
            gauge,
            by_block: DashMap::new(),
            reserve: Mutex::default(),
            one_ended: Notify::new(),
        }
    }

    /// Waits until there is room, at least in the reserve. Evicts idle connections to make room.
    pub async fn has_room(&self, caps: Caps) {
        loop {
            // Registered before the check, so that no end is missed.
            let one_ended = self.one_ended.notified();
            if self.connections.load(Ordering::Relaxed) < caps.all.saturating_add(caps.reserve) {
                return;
            }
            self.evict();
            // Wakes early if a connection ends, else when another may have become old enough to evict.
            let _ = timeout(LOOK_EVERY, one_ended).await;
        }
    }

    /// Evicts the longest idle connection of the reserve, if it is older than the grace period.
    pub fn evict(&self) {
        let mut reserve = self.reserve.lock();
        if let Some(oldest) = reserve.idle.first_entry()
            && oldest.get().0.elapsed() >= GRACE
        {
            // Fails only if the connection has just ended.
            let _ = oldest.remove().1.send(());
        }
    }

    /// Registers a connection. `client`: its address; `None` exempts it from the limit by address.
    ///
    /// Returns `None` if there is no room even to send a response.
    pub fn enter(
        self: &Arc<Self>,
        client: Option<IpAddr>,
        caps: Caps,
        accepted: Accepted,
    ) -> Option<ConnectionSlot> {
        let before = self.connections.fetch_add(1, Ordering::Relaxed);
        self.gauge.inc();
        let is_reserve = before >= caps.all || accepted == Accepted::OnSpare;
        let mut place =
            ConnectionSlot { census: Arc::clone(self), block: None, is_reserve, number: None, evicted: None };
        if before >= caps.all.saturating_add(caps.reserve) {
            return None;
        }
        if is_reserve {
            let (number, evicted) = self.enter_reserve(caps.reserve);
            (place.number, place.evicted) = (Some(number), Some(evicted));
        }
        if let (Some(client), 1..) = (client, caps.one) {
            let block = block_of(client);
            let mut count = self.by_block.entry(block).or_default();
            *count += 1;
            let of_block = *count;
            drop(count);
            place.block = Some(block);
            if of_block > caps.one {
                // One address gets only one connection more than its limit, so it cannot fill the reserve.
                place.is_reserve = true;
                return (of_block <= caps.one + 1).then_some(place);
            }
        }
        Some(place)
    }

    /// Evicts an idle connection if more than half of the reserve is idle. The rest is for connections that
    /// are being answered.
    fn enter_reserve(&self, size: usize) -> (u64, oneshot::Receiver<()>) {
        let (evict, evicted) = oneshot::channel();
        let number = {
            let mut reserve = self.reserve.lock();
            reserve.next += 1;
            let number = reserve.next;
            reserve.idle.insert(number, (Instant::now(), evict));
            if reserve.idle.len() <= (size / 2).max(1) {
                return (number, evicted);
            }
            number
        };
        self.evict();
        (number, evicted)
    }
}

impl ConnectionSlot {
    /// The connection has sent a request that is always answered, so it is no longer evicted.
    pub fn asks(&self) {
        if let Some(number) = self.number {
            self.census.reserve.lock().idle.remove(&number);
        }
    }

    /// Resolves when the connection is evicted. May be called once; later futures never resolve.
    pub fn evicted(&mut self) -> impl Future<Output = ()> + Send + use<> {
        let evicted = self.evicted.take();
        async {
            // A dropped sender means that the connection is not evicted any more.
            let is_evicted = match evicted {
                Some(evicted) => evicted.await.is_ok(),
                None => false,
            };
            if !is_evicted {
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        if self.is_reserve {
            self.asks();
        }
        self.census.connections.fetch_sub(1, Ordering::Relaxed);
        self.census.gauge.dec();
        if self.is_reserve {
            self.census.one_ended.notify_waiters();
        }
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
    use futures_util::FutureExt;
    use tokio::time::advance;

    const RESERVE: usize = 128;

    fn census() -> Arc<ConnectionCounter> {
        Arc::new(ConnectionCounter::new(IntGauge::new("connections", "open").unwrap()))
    }

    #[test]
    fn slots_are_freed_on_drop() {
        let census = census();
        let caps = Caps { all: 2, reserve: RESERVE, one: 0 };
        let places: Vec<_> =
            (0..2 + RESERVE).map(|_| census.enter(None, caps, Accepted::Usually).unwrap()).collect();
        assert_eq!(places.iter().filter(|place| place.is_reserve).count(), RESERVE);
        assert!(census.enter(None, caps, Accepted::Usually).is_none());
        drop(places);
        assert_eq!((census.connections.load(Ordering::Relaxed), census.gauge.get()), (0, 0));
        assert!(!census.enter(None, caps, Accepted::Usually).unwrap().is_reserve);
    }

    #[test]
    fn one_address_is_limited() {
        let census = census();
        let caps = Caps { all: 100, reserve: RESERVE, one: 2 };
        let enter = |ip: &str| census.enter(Some(ip.parse().unwrap()), caps, Accepted::Usually);
        let first = (enter("2001:db8::1").unwrap(), enter("2001:db8::2").unwrap());
        let rejected = enter("2001:db8::3").unwrap();
        assert!(!first.0.is_reserve && !first.1.is_reserve && rejected.is_reserve);
        assert!(enter("2001:db8::4").is_none());
        assert!(!enter("2001:db8:0:1::1").unwrap().is_reserve, "another /64");
        assert!(!enter("10.0.0.1").unwrap().is_reserve);
        drop((first, rejected));
        assert!(!enter("2001:db8::4").unwrap().is_reserve);
        assert!(census.by_block.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connections_of_the_reserve_are_evicted() {
        let census = census();
        let caps = Caps { all: 1, reserve: 4, one: 0 };
        let enter = || {
            let mut place = census.enter(None, caps, Accepted::Usually).unwrap();
            let evicted = Box::pin(place.evicted());
            (place, evicted)
        };
        let (mut usual, mut asks) = (enter(), enter());
        asks.0.asks();
        let (mut first, mut second) = (enter(), enter());
        advance(GRACE).await;
        let mut third = enter();
        assert_eq!((&mut first.1).now_or_never(), Some(()), "the longest idle one is evicted");
        for place in [&mut usual, &mut asks, &mut second, &mut third] {
            assert_eq!((&mut place.1).now_or_never(), None);
        }
        assert!(census.enter(None, caps, Accepted::Usually).is_none(), "it has not ended yet");
        drop((usual, asks, first, second));
        census.evict();
        assert_eq!((&mut third.1).now_or_never(), None, "it is within the grace period");
        advance(GRACE).await;
        census.evict();
        assert_eq!((&mut third.1).now_or_never(), Some(()));
        drop(third);
        assert!(census.reserve.lock().idle.is_empty());
        assert!(
            census.enter(None, caps, Accepted::OnSpare).unwrap().is_reserve,
            "a spare descriptor must be freed soon"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_for_room_evicts_idle_connections() {
        let census = census();
        let caps = Caps { all: 1, reserve: 2, one: 0 };
        let mut places: Vec<_> =
            (0..3).map(|_| census.enter(None, caps, Accepted::Usually).unwrap()).collect();
        let mut room = Box::pin(census.has_room(caps));
        assert_eq!((&mut room).now_or_never(), None);
        let oldest = places.remove(1);
        drop(oldest);
        room.await;

        places.push(census.enter(None, caps, Accepted::Usually).unwrap());
        let began = Instant::now();
        let leaver = async {
            places[1].evicted().await;
            drop(places);
        };
        tokio::join!(census.has_room(caps), leaver);
        assert!(began.elapsed() >= GRACE, "not within the grace period");
    }
}
