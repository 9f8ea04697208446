//! How many connections there are, in all and of one address, and whether there may be one more.

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

pub struct Census {
    connections: AtomicUsize,
    gauge: IntGauge,
    /// By address, or /64 of IPv6; only while there is a cap by address.
    by_block: DashMap<IpAddr, usize>,
    reserve: Mutex<Reserve>,
    /// A connection of the reserve has ended.
    one_ended: Notify,
}

/// Connections of the reserve that have asked nothing yet that is always answered, by their number, the
/// oldest first. They must not keep out one that does ask: clients that say nothing are cheap to have.
#[derive(Default)]
struct Reserve {
    next: u64,
    idle: BTreeMap<u64, (Instant, oneshot::Sender<()>)>,
}

/// How long a connection of the reserve may take to ask before it may be evicted.
const GRACE: Duration = Duration::from_millis(250);
/// How often those who wait for room look whether somebody may be evicted by now.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One connection; gives its place back when dropped.
pub struct Place {
    census: Arc<Census>,
    block: Option<IpAddr>,
    /// There is room for it only to be told so.
    pub is_reserve: bool,
    /// Its number among the idle ones of the reserve.
    number: Option<u64>,
    evicted: Option<oneshot::Receiver<()>>,
}

/// Most connections: in all, beyond those in the reserve, and of one address (0: no cap).
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
    /// On a descriptor that was held back: it must be free again soon.
    OnSpare,
}

impl Census {
    pub fn new(gauge: IntGauge) -> Self {
        Self {
            connections: AtomicUsize::new(0),
            gauge,
            by_block: DashMap::new(),
            reserve: Mutex::default(),
            one_ended: Notify::new(),
        }
    }

    /// Waits while there is no room even in the reserve, and makes some.
    pub async fn has_room(&self, caps: Caps) {
        loop {
            // Before the look: what ends after it counts.
            let one_ended = self.one_ended.notified();
            if self.connections.load(Ordering::Relaxed) < caps.all.saturating_add(caps.reserve) {
                return;
            }
            self.evict();
            // The time is over when somebody may be evicted who might not before.
            let _ = timeout(LOOK_EVERY, one_ended).await;
        }
    }

    /// Ends the connection of the reserve that has been idle for longest, unless it is too young.
    pub fn evict(&self) {
        let mut reserve = self.reserve.lock();
        if let Some(oldest) = reserve.idle.first_entry()
            && oldest.get().0.elapsed() >= GRACE
        {
            // One that has just ended needs no word.
            let _ = oldest.remove().1.send(());
        }
    }

    /// A place for a connection from `client`, whom the cap by address spares if it is `None`. `None`: there is no room
    /// even for a refusal.
    pub fn enter(self: &Arc<Self>, client: Option<IpAddr>, caps: Caps, accepted: Accepted) -> Option<Place> {
        let before = self.connections.fetch_add(1, Ordering::Relaxed);
        self.gauge.inc();
        let is_reserve = before >= caps.all || accepted == Accepted::OnSpare;
        let mut place =
            Place { census: Arc::clone(self), block: None, is_reserve, number: None, evicted: None };
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
                // One address may not take the whole reserve either.
                place.is_reserve = true;
                return (of_block <= caps.one + 1).then_some(place);
            }
        }
        Some(place)
    }

    /// Half of it at most is idle; the other half is for those who are on their way out.
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

impl Place {
    /// It asks something that is always answered: from now on it is not evicted.
    pub fn asks(&self) {
        if let Some(number) = self.number {
            self.census.reserve.lock().idle.remove(&number);
        }
    }

    /// Resolves when it must go, for another one. To be asked for once.
    pub fn evicted(&mut self) -> impl Future<Output = ()> + Send + use<> {
        let evicted = self.evicted.take();
        async {
            // A sender that is gone means that it may stay.
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

impl Drop for Place {
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

    fn census() -> Arc<Census> {
        Arc::new(Census::new(IntGauge::new("connections", "open").unwrap()))
    }

    #[test]
    fn places_are_given_back() {
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
    fn one_address_has_a_cap_of_its_own() {
        let census = census();
        let caps = Caps { all: 100, reserve: RESERVE, one: 2 };
        let enter = |ip: &str| census.enter(Some(ip.parse().unwrap()), caps, Accepted::Usually);
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

    #[tokio::test(start_paused = true)]
    async fn who_asks_nothing_makes_room_in_the_reserve() {
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
        assert_eq!((&mut first.1).now_or_never(), Some(()), "the one that was idle for longest goes");
        for place in [&mut usual, &mut asks, &mut second, &mut third] {
            assert_eq!((&mut place.1).now_or_never(), None);
        }
        assert!(census.enter(None, caps, Accepted::Usually).is_none(), "it has not left yet");
        drop((usual, asks, first, second));
        census.evict();
        assert_eq!((&mut third.1).now_or_never(), None, "it is too young");
        advance(GRACE).await;
        census.evict();
        assert_eq!((&mut third.1).now_or_never(), Some(()));
        drop(third);
        assert!(census.reserve.lock().idle.is_empty());
        assert!(
            census.enter(None, caps, Accepted::OnSpare).unwrap().is_reserve,
            "it must be free again soon"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn room_is_waited_for_and_made() {
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
        assert!(began.elapsed() >= GRACE, "no sooner");
    }
}
