use super::*;
use crate::backend::{BackendError, Decision, Grant, LeaseCall};
use crate::config::KeyLimitConf;
use crate::model::Quota;
use async_trait::async_trait;
use http::{HeaderName, HeaderValue};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::{advance, sleep};

fn conf(name: &str, identity: Identity, burst: u32, on_redis_loss: OnRedisLoss) -> LimitConf {
    let (name, routes, mode) = (name.into(), vec!["/run".to_owned()], LimitMode::Leased);
    LimitConf { name, identity, mode, routes, rate: 60, period_s: 60, burst, on_redis_loss }
}

/// A limiter whose loop runs until the test ends.
fn limiter(conf: &[LimitConf], shared: Option<Arc<dyn LimitStore>>) -> RateLimiter {
    let (limiter, leaser) = RateLimiter::new(conf, &[], shared, Arc::new(Metrics::new(1).unwrap()));
    #[expect(clippy::disallowed_methods, reason = "the test starts the loop instead of boot")]
    tokio::spawn(leaser.run());
    limiter
}

async fn ask(
    limiter: &RateLimiter,
    key: &str,
    client: Option<&str>,
) -> (Result<(), Rejection>, RateLimitState) {
    let mut counted = RateLimitState::default();
    let client = client.map(|ip| ip.parse().unwrap());
    let result = limiter.check("/run", Some(&key.into()), || client, &mut counted).await;
    (result, counted)
}

async fn passes(limiter: &RateLimiter, key: &str) -> bool {
    ask(limiter, key, None).await.0.is_ok()
}

fn fields(counted: &RateLimitState) -> Vec<(HeaderName, HeaderValue)> {
    let mut fields = Vec::new();
    crate::gateway::rate_limit::add_fields(counted, &mut fields);
    fields
}

fn field<'a>(fields: &'a [(HeaderName, HeaderValue)], name: &str) -> &'a str {
    fields.iter().find(|(n, _)| n == name).map(|(_, v)| v.to_str().unwrap()).unwrap()
}

/// A bucket that never refills, with faults that can be injected.
#[derive(Default)]
struct Tank {
    tokens: AtomicU32,
    calls: AtomicU32,
    is_away: AtomicBool,
    takes: Duration,
    nodes: u32,
}

impl Tank {
    fn of(tokens: u32) -> Self {
        let takes = Duration::from_millis(2);
        Self { tokens: AtomicU32::new(tokens), takes, nodes: 1, ..Self::default() }
    }

    async fn serve(&self) -> Result<(), BackendError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        sleep(self.takes).await;
        let is_away = self.is_away.load(Ordering::Relaxed);
        if is_away { Err(BackendError::Unavailable("away".into())) } else { Ok(()) }
    }

    fn draw(&self, tokens: u32) -> u32 {
        let there = self.tokens.load(Ordering::Relaxed);
        self.tokens.store(there - tokens.min(there), Ordering::Relaxed);
        tokens.min(there)
    }

    fn calls(&self) -> u32 {
        self.calls.swap(0, Ordering::Relaxed)
    }
}

#[tokio::test]
async fn a_key_may_have_numbers_of_its_own() {
    let key = |burst| KeyConf {
        name: "vip".into(),
        sha256: crate::config::KeyHash([0; 32]),
        scopes: Vec::new(),
        functions: None,
        not_before: None,
        expires: None,
        limit: Some(KeyLimitConf { rate: 1, period_s: 3600, burst }),
        jobs_max: None,
    };
    let shared = [
        conf("a", Identity::Key, 1, OnRedisLoss::Local),
        conf("all", Identity::Global, 6, OnRedisLoss::Local),
    ];
    let limiter = limiter(&shared, None);
    limiter.set_conf(&shared, &[key(3)]);
    assert!(passes(&limiter, "x").await && !passes(&limiter, "x").await);
    for expected in [true, true, true, false] {
        assert_eq!(passes(&limiter, "vip").await, expected);
    }
    // What was counted stays counted while the numbers are the same.
    limiter.set_conf(&shared, &[key(3)]);
    assert!(!passes(&limiter, "vip").await);
    limiter.set_conf(&shared, &[key(9)]);
    assert!(passes(&limiter, "vip").await);
    assert!(passes(&limiter, "vip").await, "the sixth of all");
    assert!(!passes(&limiter, "vip").await, "the limits of all are the key's as well");
}

#[async_trait]
impl LimitStore for Tank {
    async fn take(&self, buckets: &[(String, Quota)]) -> Result<Vec<Decision>, BackendError> {
        self.serve().await?;
        let decide = |_: &_| {
            let allowed = self.draw(1) == 1;
            let remaining = self.tokens.load(Ordering::Relaxed);
            Decision { allowed, remaining, retry_after: Duration::from_secs(u64::from(!allowed)) }
        };
        Ok(buckets.iter().map(decide).collect())
    }

    async fn lease(&self, call: &LeaseCall) -> Result<Grant, BackendError> {
        self.serve().await?;
        self.tokens.fetch_add(call.back, Ordering::Relaxed);
        let taken = self.draw(call.need);
        let half = self.tokens.load(Ordering::Relaxed) / 2;
        let amount = call.held + self.draw(call.want.min(half));
        let left = self.tokens.load(Ordering::Relaxed);
        let retry_after = if left == 0 { Duration::from_secs(1) } else { Duration::ZERO };
        Ok(Grant { applied: true, amount, taken, left, retry_after, nodes: self.nodes })
    }
}

#[tokio::test]
async fn a_key_is_limited_and_told_so() {
    let limiter = limiter(&[conf("k", Identity::Key, 2, OnRedisLoss::Local)], None);
    for remaining in ["1", "0"] {
        let (result, counted) = ask(&limiter, "a", None).await;
        let fields = fields(&counted);
        assert_eq!(result, Ok(()));
        assert_eq!(field(&fields, "x-ratelimit-limit"), "2");
        assert_eq!(field(&fields, "x-ratelimit-remaining"), remaining);
        assert_eq!(field(&fields, "ratelimit-policy"), "\"k\";q=60;w=60");
    }
    let (result, counted) = ask(&limiter, "a", None).await;
    assert_eq!(result, Err(Rejection::Limited { retry_after_s: 1 }));
    assert_eq!(field(&fields(&counted), "ratelimit"), "\"k\";r=0;t=2");
    assert!(passes(&limiter, "b").await, "another key has its own bucket");
    let mut counted = RateLimitState::default();
    let free = limiter.check("/status/:jobId", Some(&"a".into()), || None, &mut counted).await;
    assert_eq!((free, fields(&counted)), (Ok(()), vec![]), "another route is free");
}

#[tokio::test]
async fn both_steps_stand_in_the_fields() {
    let by_function = conf("f", Identity::Function, 1, OnRedisLoss::Local);
    let all = [
        by_function,
        conf("k", Identity::Key, 9, OnRedisLoss::Local),
        conf("g", Identity::Global, 5, OnRedisLoss::Local),
    ];
    let limiter = limiter(&all, None);
    let function = FunctionId::parse("fn-1").unwrap();
    for (result, state) in [
        (Ok(()), "\"k\";r=8;t=1, \"g\";r=4;t=1, \"f\";r=0;t=1"),
        (Err(Rejection::Limited { retry_after_s: 1 }), "\"k\";r=7;t=2, \"g\";r=3;t=2, \"f\";r=0;t=1"),
    ] {
        let (early, counted) = ask(&limiter, "a", None).await;
        assert_eq!(early, Ok(()));
        assert_eq!(field(&fields(&counted), "ratelimit-policy"), "\"k\";q=60;w=60, \"g\";q=60;w=60");
        assert_eq!(limiter.check_function(&function, &counted).await, result);
        let fields = fields(&counted);
        assert_eq!(field(&fields, "ratelimit"), state);
        assert_eq!(
            (field(&fields, "x-ratelimit-limit"), field(&fields, "x-ratelimit-remaining")),
            ("1", "0")
        );
        assert_eq!(field(&fields, "ratelimit-policy"), "\"k\";q=60;w=60, \"g\";q=60;w=60, \"f\";q=60;w=60");
    }
}

#[tokio::test(start_paused = true)]
async fn requests_share_calls_and_refusals_make_none() {
    let store = Arc::new(Tank::of(1000));
    let limiter =
        limiter(&[conf("k", Identity::Key, 1000, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
    let crowd = futures_util::future::join_all((0..500).map(|_| passes(&limiter, "a"))).await;
    assert!(crowd.iter().all(|passed| *passed));
    assert_eq!(store.calls(), 1, "all found nothing, and one call was made for them");
    let mut through = 500;
    while passes(&limiter, "a").await {
        through += 1;
    }
    assert_eq!(through, 1000);
    store.calls();
    for _ in 0..10_000 {
        assert!(!passes(&limiter, "a").await);
    }
    assert_eq!(store.calls(), 0, "a refusal is remembered");
    store.tokens.store(1, Ordering::Relaxed);
    advance(Duration::from_millis(1100)).await;
    assert!(passes(&limiter, "a").await);
    assert_eq!(store.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_ends_no_call() {
    let store = Arc::new(Tank::of(1));
    let limiter = limiter(&[conf("k", Identity::Key, 2, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
    let gone = tokio::time::timeout(Duration::from_millis(1), passes(&limiter, "a"));
    let (gone, other) = tokio::join!(gone, passes(&limiter, "a"));
    assert!(gone.is_err() && other);
    assert_eq!(store.calls(), 1, "the one token went to the other");
}

#[tokio::test(start_paused = true)]
async fn a_lease_left_alone_goes_back() {
    let store = Arc::new(Tank::of(100));
    let limiter =
        limiter(&[conf("k", Identity::Key, 100, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
    let mut passed = 0;
    while store.tokens.load(Ordering::Relaxed) + passed >= 95 {
        assert!(passes(&limiter, "a").await);
        passed += 1;
    }
    sleep(Duration::from_secs(1)).await;
    assert_eq!(store.tokens.load(Ordering::Relaxed) + passed, 100);
    sleep(Duration::from_secs(3)).await;
    assert!(limiter.0.plans.load().limits.iter().all(|limit| limit.leases() == 0), "it is forgotten");
}

#[tokio::test(start_paused = true)]
async fn what_another_limit_refuses_is_given_back() {
    let store = Arc::new(Tank::of(40));
    let exact = LimitConf { mode: LimitMode::Exact, ..conf("e", Identity::Key, 1, OnRedisLoss::Closed) };
    let both = [conf("k", Identity::Key, 40, OnRedisLoss::Closed), exact];
    let limiter = limiter(&both, Some(Arc::clone(&store) as _));
    for _ in 0..4 {
        assert!(passes(&limiter, "a").await);
    }
    store.tokens.store(0, Ordering::Relaxed);
    let remaining = |counted: &RateLimitState| counted.decisions().next().map(|(_, d)| d.remaining);
    let (first, before) = ask(&limiter, "a", None).await;
    let (second, after) = ask(&limiter, "a", None).await;
    assert!(first.is_err() && second.is_err());
    assert_eq!(remaining(&before), remaining(&after));
}

#[tokio::test(start_paused = true)]
async fn without_the_shared_count_a_limit_does_as_configured() {
    for (on_loss, nodes, through) in
        [(OnRedisLoss::Local, 1, 4), (OnRedisLoss::Local, 3, 1), (OnRedisLoss::Closed, 1, 0)]
    {
        for mode in [LimitMode::Leased, LimitMode::Exact] {
            let store = Arc::new(Tank { nodes, ..Tank::of(100) });
            let limiter = limiter(
                &[LimitConf { mode, ..conf("k", Identity::Key, 4, on_loss) }],
                Some(Arc::clone(&store) as _),
            );
            // An exact limit learns of other nodes from leased ones only.
            limiter
                .0
                .store
                .lease(&limiter.0.plans.load().limits[0].call_without_lease(&LimitIdentity::Global))
                .await;
            store.is_away.store(true, Ordering::Relaxed);
            let start = tokio::time::Instant::now();
            let mut passed = 0;
            for _ in 0..20 {
                passed += u32::from(passes(&limiter, "a").await);
            }
            assert_eq!(passed, through, "{on_loss:?} {mode:?}");
            assert!(start.elapsed() < Duration::from_millis(10), "one waits to learn it, the others do not");
            let refusal = ask(&limiter, "a", None).await.0.unwrap_err();
            assert_eq!(refusal == Rejection::Away, on_loss == OnRedisLoss::Closed, "{refusal:?}");
            store.is_away.store(false, Ordering::Relaxed);
            // So long that no further request is expected. One request probes the store nevertheless.
            advance(Duration::from_secs(1)).await;
            passes(&limiter, "a").await;
            sleep(Duration::from_millis(10)).await;
            assert!(passes(&limiter, "a").await, "it is back: {on_loss:?} {mode:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn leases_paid_for_are_spent_while_the_store_is_away() {
    let store = Arc::new(Tank::of(1000));
    let limiter =
        limiter(&[conf("k", Identity::Key, 1000, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
    for _ in 0..50 {
        assert!(passes(&limiter, "a").await);
    }
    store.is_away.store(true, Ordering::Relaxed);
    let mut passed = 0;
    while passes(&limiter, "a").await {
        passed += 1;
    }
    assert!(passed > 0);
    assert_eq!(ask(&limiter, "a", None).await.0, Err(Rejection::Away));
}

#[tokio::test(start_paused = true)]
async fn without_room_for_a_lease_each_request_asks() {
    let store = Arc::new(Tank::of(2));
    let limiter = limiter(&[conf("ip", Identity::Ip, 2, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
    limiter.0.plans.load().limits[0].fill();
    for passed in [true, true, false, false] {
        assert_eq!(ask(&limiter, "a", Some("::1")).await.0.is_ok(), passed);
    }
    assert_eq!((store.calls(), limiter.0.plans.load().limits[0].leases()), (4, 0));
}

#[tokio::test(start_paused = true)]
async fn new_limits_hold_at_once_and_the_same_go_on() {
    let store = Arc::new(Tank::of(100));
    let (same, old) = (
        conf("a", Identity::Key, 50, OnRedisLoss::Closed),
        conf("b", Identity::Global, 50, OnRedisLoss::Closed),
    );
    let new = LimitConf { burst: 70, ..old.clone() };
    let limiter = limiter(&[same.clone(), old], Some(Arc::clone(&store) as _));
    for _ in 0..5 {
        assert!(passes(&limiter, "a").await);
    }
    let leases =
        |limiter: &RateLimiter| limiter.0.plans.load().limits.iter().map(|l| l.leases()).collect::<Vec<_>>();
    assert_eq!(leases(&limiter), [1, 1]);
    limiter.set_conf(&[new, same], &[]);
    assert_eq!(leases(&limiter), [0, 1]);
    let (passed, counted) = ask(&limiter, "a", None).await;
    assert_eq!(passed, Ok(()));
    assert!(field(&fields(&counted), "ratelimit").starts_with("\"b\""));
    limiter.set_conf(&[], &[]);
    assert_eq!(fields(&ask(&limiter, "a", None).await.1), []);
    sleep(Duration::from_secs(3)).await;
    assert_eq!(limiter.0.swept.lock().len(), 0, "old limits go");
}
