//! Caches the credentials of direct calls: taken from the SDK's chain and refreshed before they expire.

use crate::backend::BackendError;
use crate::backend::aws::error::credentials_class;
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use parking_lot::{Mutex, MutexGuard};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Credentials are refreshed this long before they expire, because a signature must still be valid when it
/// arrives.
const REFRESH_EARLY: Duration = Duration::from_secs(60);
/// Credentials without an expiry are refreshed after this time, as in the SDK.
const KEPT_MAX: Duration = Duration::from_secs(15 * 60);
/// Timeouts of the credentials chain: while the current credentials are valid, and without any.
const REFRESHED_WITHIN: Duration = Duration::from_secs(1);
const FOUND_WITHIN: Duration = Duration::from_secs(5);
/// Younger credentials are not discarded after a rejection. In that case the policy is the cause, and each
/// call would ask the chain again.
const TRUSTED_FOR: Duration = Duration::from_secs(10);
/// After a failure valid credentials are used for this long before the next attempt.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// Without valid credentials, callers share a failure for this long.
const FAILURE_SHARED: Duration = Duration::from_secs(1);

pub(in super::super) struct CredentialCache {
    provider: SharedCredentialsProvider,
    kept: Mutex<Option<CachedCredentials>>,
    /// The last failure, shared by callers that waited for the same attempt.
    failed: Mutex<Option<(Instant, BackendError)>>,
    /// Held while the provider is asked.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct CachedCredentials {
    credentials: Arc<Credentials>,
    since: Instant,
    refresh_at: SystemTime,
}

impl CredentialCache {
    pub(in super::super) fn new(provider: SharedCredentialsProvider) -> Self {
        Self {
            provider,
            kept: Mutex::default(),
            failed: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
        }
    }

    /// Returns valid credentials.
    pub async fn get(&self) -> Result<Arc<Credentials>, BackendError> {
        if let Some(credentials) = self.fresh() {
            return Ok(credentials);
        }
        let _only_one = match (self.asking.try_lock(), self.old()) {
            (Ok(only_one), _) => only_one,
            // Another caller asks the provider; meanwhile the current credentials are used.
            (Err(_), Some(old)) => return Ok(old),
            (Err(_), None) => self.asking.lock().await,
        };
        // Another caller may have refreshed them while this one waited for the lock.
        if let Some(credentials) = self.fresh() {
            return Ok(credentials);
        }
        if let Some(error) = self.just_failed() {
            return self.old().ok_or(error);
        }
        match self.ask().await {
            Ok(credentials) => Ok(self.keep(credentials)),
            Err(error) => {
                tracing::warn!(%error, "AWS credentials not refreshed; retrying. Check their source");
                *self.failed.lock() = Some((Instant::now(), error.clone()));
                self.use_old().ok_or(error)
            }
        }
    }

    fn just_failed(&self) -> Option<BackendError> {
        let failed = self.failed.lock();
        failed.as_ref().filter(|(at, _)| at.elapsed() < FAILURE_SHARED).map(|(_, error)| error.clone())
    }

    async fn ask(&self) -> Result<Credentials, BackendError> {
        let within = if self.old().is_some() { REFRESHED_WITHIN } else { FOUND_WITHIN };
        match tokio::time::timeout(within, self.provider.provide_credentials()).await {
            Ok(asked) => asked.map_err(|error| credentials_class(&error)),
            Err(_) => Err(BackendError::Unavailable("no credentials in time".into())),
        }
    }

    fn keep(&self, credentials: Credentials) -> Arc<Credentials> {
        let refresh_at = match credentials.expiry() {
            // Short-lived credentials are refreshed early, but not on each call.
            Some(at) => {
                let early = at.checked_sub(REFRESH_EARLY).unwrap_or(SystemTime::UNIX_EPOCH);
                early.max(SystemTime::now() + PAUSE_AFTER_FAILURE).min(at)
            }
            None => SystemTime::now() + KEPT_MAX,
        };
        let credentials = Arc::new(credentials);
        *self.kept() = Some(CachedCredentials {
            credentials: Arc::clone(&credentials),
            since: Instant::now(),
            refresh_at,
        });
        credentials
    }

    /// Called when the credentials were rejected. The next call asks the provider, unless it was asked very
    /// recently.
    pub fn forget(&self) {
        if let Some(kept) = self.kept().as_mut().filter(|kept| kept.since.elapsed() >= TRUSTED_FOR) {
            kept.refresh_at = SystemTime::UNIX_EPOCH;
        }
    }

    fn fresh(&self) -> Option<Arc<Credentials>> {
        let kept = self.kept();
        kept.as_ref()
            .filter(|kept| SystemTime::now() < kept.refresh_at)
            .map(|kept| Arc::clone(&kept.credentials))
    }

    /// The current credentials, if they have not expired.
    fn old(&self) -> Option<Arc<Credentials>> {
        let kept = self.kept();
        let old = kept.as_ref()?;
        let lasts = old.credentials.expiry().is_none_or(|at| at > SystemTime::now());
        lasts.then(|| Arc::clone(&old.credentials))
    }

    /// The same. Also delays the next attempt to refresh them.
    fn use_old(&self) -> Option<Arc<Credentials>> {
        let old = self.old()?;
        if let Some(kept) = self.kept().as_mut() {
            let later = SystemTime::now() + PAUSE_AFTER_FAILURE;
            kept.refresh_at = old.expiry().map_or(later, |at| at.min(later));
        }
        Some(old)
    }

    fn kept(&self) -> MutexGuard<'_, Option<CachedCredentials>> {
        self.kept.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_credential_types::provider::error::CredentialsError;
    use aws_credential_types::provider::future;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Returns credentials with these lifetimes, then fails or never answers.
    #[derive(Debug)]
    struct Chain {
        lifetimes: Vec<Option<Duration>>,
        hangs: bool,
        asked: Arc<AtomicUsize>,
    }

    impl ProvideCredentials for Chain {
        fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
        where
            Self: 'a,
        {
            let n = self.asked.fetch_add(1, Ordering::SeqCst);
            future::ProvideCredentials::ready(match self.lifetimes.get(n) {
                Some(lifetime) => {
                    let expiry = lifetime.map(|lifetime| SystemTime::now() + lifetime);
                    Ok(Credentials::new(format!("AK{n}"), "secret", None, expiry, "test"))
                }
                None if self.hangs => return future::ProvideCredentials::new(std::future::pending()),
                None => Err(CredentialsError::not_loaded("gone")),
            })
        }
    }

    fn cache(lifetimes: &[Option<Duration>]) -> (CredentialCache, Arc<AtomicUsize>) {
        cache_of(lifetimes, false)
    }

    fn cache_of(lifetimes: &[Option<Duration>], hangs: bool) -> (CredentialCache, Arc<AtomicUsize>) {
        let asked = Arc::<AtomicUsize>::default();
        let chain = Chain { lifetimes: lifetimes.to_vec(), hangs, asked: Arc::clone(&asked) };
        (CredentialCache::new(SharedCredentialsProvider::new(chain)), asked)
    }

    async fn key(cache: &CredentialCache) -> Option<String> {
        Some(cache.get().await.ok()?.access_key_id().to_owned())
    }

    /// Makes a refresh due.
    fn due(cache: &CredentialCache) {
        cache.kept().as_mut().expect("credentials").refresh_at = SystemTime::UNIX_EPOCH;
    }

    #[tokio::test]
    async fn the_chain_is_asked_once_while_credentials_are_fresh() {
        let (cache, asked) = cache(&[None, Some(Duration::from_secs(3600))]);
        for _ in 0..3 {
            assert_eq!(key(&cache).await.as_deref(), Some("AK0"));
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        cache.forget();
        assert_eq!(key(&cache).await.as_deref(), Some("AK0"), "too young to be discarded");
        let aged = Instant::now().checked_sub(TRUSTED_FOR).expect("the machine is up for longer");
        cache.kept().as_mut().expect("credentials").since = aged;
        cache.forget();
        assert_eq!(key(&cache).await.as_deref(), Some("AK1"));
        assert_eq!(key(&cache).await.as_deref(), Some("AK1"));
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_chain_that_hangs_delays_one_caller_while_credentials_are_valid() {
        let (cache, asked) = cache_of(&[Some(Duration::from_secs(30))], true);
        assert_eq!(key(&cache).await.as_deref(), Some("AK0"));
        due(&cache);
        let (first, second) = tokio::join!(key(&cache), async {
            let started = tokio::time::Instant::now();
            (key(&cache).await, started.elapsed())
        });
        assert_eq!(first.as_deref(), Some("AK0"));
        assert_eq!(second, (Some("AK0".to_owned()), Duration::ZERO), "only one caller waits");
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn credentials_about_to_expire_are_replaced_or_used_until_they_expire() {
        let (cache, asked) = cache(&[Some(Duration::from_secs(30)), Some(Duration::from_secs(20))]);
        for expected in ["AK0", "AK0"] {
            assert_eq!(key(&cache).await.as_deref(), Some(expected), "not refreshed on each call");
        }
        due(&cache);
        assert_eq!(key(&cache).await.as_deref(), Some("AK1"));
        due(&cache);
        for _ in 0..3 {
            assert_eq!(key(&cache).await.as_deref(), Some("AK1"), "the provider fails now");
        }
        assert_eq!(asked.load(Ordering::SeqCst), 3, "and is not asked again before the pause has passed");
    }

    #[tokio::test]
    async fn callers_that_wait_share_a_failure() {
        let (cache, asked) = cache(&[]);
        let keys = futures_util::future::join_all((0..10).map(|_| key(&cache))).await;
        assert_eq!((keys, asked.load(Ordering::SeqCst)), (vec![None; 10], 1));
    }

    #[tokio::test]
    async fn expired_credentials_are_not_used() {
        let (cache, _) = cache(&[Some(Duration::ZERO)]);
        assert!(key(&cache).await.is_some());
        assert_eq!(key(&cache).await, None);
    }
}
