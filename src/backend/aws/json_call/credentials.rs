//! The credentials of direct calls: from the SDK's chain, kept until shortly before they run out.

use crate::backend::BackendError;
use crate::backend::aws::error::credentials_class;
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Credentials are asked for anew so long before they run out: a signature must be good when it arrives.
const REFRESH_EARLY: Duration = Duration::from_secs(60);
/// Those that do not say when they run out are asked for anew after this, as the SDK does.
const KEPT_MAX: Duration = Duration::from_secs(15 * 60);
/// How long the chain may take: while the old ones are good, and when there are none.
const REFRESHED_WITHIN: Duration = Duration::from_secs(1);
const FOUND_WITHIN: Duration = Duration::from_secs(5);
/// Younger ones are not thrown away for a refusal: then it is the policy that refuses, and each call would ask anew.
const TRUSTED_FOR: Duration = Duration::from_secs(10);
/// After a failure the old ones are used so long before the next try.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// Without any, so long.
const FAILURE_SHARED: Duration = Duration::from_secs(1);

pub(in super::super) struct CredentialCache {
    provider: SharedCredentialsProvider,
    kept: Mutex<Option<Kept>>,
    /// The last failure: those who wait for the same answer need not ask again.
    failed: Mutex<Option<(Instant, BackendError)>>,
    /// Held by the one who asks the provider.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct Kept {
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

    /// Credentials that are still good.
    pub async fn get(&self) -> Result<Arc<Credentials>, BackendError> {
        if let Some(credentials) = self.fresh() {
            return Ok(credentials);
        }
        let _only_one = match (self.asking.try_lock(), self.old()) {
            (Ok(only_one), _) => only_one,
            // Somebody asks; meanwhile the old ones do.
            (Err(_), Some(old)) => return Ok(old),
            (Err(_), None) => self.asking.lock().await,
        };
        // Another one may have asked while we waited.
        if let Some(credentials) = self.fresh() {
            return Ok(credentials);
        }
        if let Some(error) = self.just_failed() {
            return self.old().ok_or(error);
        }
        match self.ask().await {
            Ok(credentials) => Ok(self.keep(credentials)),
            Err(error) => {
                tracing::warn!(%error, "Credentials Not Refreshed");
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some((Instant::now(), error.clone()));
                self.use_old().ok_or(error)
            }
        }
    }

    fn just_failed(&self) -> Option<BackendError> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
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
            // Those that run out soon are asked for anew soon, but not on each call.
            Some(at) => {
                let early = at.checked_sub(REFRESH_EARLY).unwrap_or(SystemTime::UNIX_EPOCH);
                early.max(SystemTime::now() + PAUSE_AFTER_FAILURE).min(at)
            }
            None => SystemTime::now() + KEPT_MAX,
        };
        let credentials = Arc::new(credentials);
        *self.kept() =
            Some(Kept { credentials: Arc::clone(&credentials), since: Instant::now(), refresh_at });
        credentials
    }

    /// They were refused: the next call asks the provider, unless it has just been asked.
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

    /// The old ones, while they last.
    fn old(&self) -> Option<Arc<Credentials>> {
        let kept = self.kept();
        let old = kept.as_ref()?;
        let lasts = old.credentials.expiry().is_none_or(|at| at > SystemTime::now());
        lasts.then(|| Arc::clone(&old.credentials))
    }

    /// The same, and the provider is left alone for a while.
    fn use_old(&self) -> Option<Arc<Credentials>> {
        let old = self.old()?;
        if let Some(kept) = self.kept().as_mut() {
            let later = SystemTime::now() + PAUSE_AFTER_FAILURE;
            kept.refresh_at = old.expiry().map_or(later, |at| at.min(later));
        }
        Some(old)
    }

    fn kept(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_credential_types::provider::error::CredentialsError;
    use aws_credential_types::provider::future;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Gives credentials of these lifetimes, then fails, or does not answer.
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

    /// As if the time to ask anew had come.
    fn due(cache: &CredentialCache) {
        cache.kept().as_mut().expect("credentials").refresh_at = SystemTime::UNIX_EPOCH;
    }

    #[tokio::test]
    async fn they_are_asked_for_once_while_they_last() {
        let (cache, asked) = cache(&[None, Some(Duration::from_secs(3600))]);
        for _ in 0..3 {
            assert_eq!(key(&cache).await.as_deref(), Some("AK0"));
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        cache.forget();
        assert_eq!(key(&cache).await.as_deref(), Some("AK0"), "too young to be the fault");
        let aged = Instant::now().checked_sub(TRUSTED_FOR).expect("the machine is up for longer");
        cache.kept().as_mut().expect("credentials").since = aged;
        cache.forget();
        assert_eq!(key(&cache).await.as_deref(), Some("AK1"));
        assert_eq!(key(&cache).await.as_deref(), Some("AK1"));
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_chain_that_hangs_is_not_waited_for_while_the_old_ones_last() {
        let (cache, asked) = cache_of(&[Some(Duration::from_secs(30))], true);
        assert_eq!(key(&cache).await.as_deref(), Some("AK0"));
        due(&cache);
        let (first, second) = tokio::join!(key(&cache), async {
            let started = tokio::time::Instant::now();
            (key(&cache).await, started.elapsed())
        });
        assert_eq!(first.as_deref(), Some("AK0"));
        assert_eq!(second, (Some("AK0".to_owned()), Duration::ZERO), "only one waits");
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn those_about_to_run_out_are_replaced_or_used_to_the_end() {
        let (cache, asked) = cache(&[Some(Duration::from_secs(30)), Some(Duration::from_secs(20))]);
        for expected in ["AK0", "AK0"] {
            assert_eq!(key(&cache).await.as_deref(), Some(expected), "not anew on each call");
        }
        due(&cache);
        assert_eq!(key(&cache).await.as_deref(), Some("AK1"));
        due(&cache);
        for _ in 0..3 {
            assert_eq!(key(&cache).await.as_deref(), Some("AK1"), "the provider fails now");
        }
        assert_eq!(asked.load(Ordering::SeqCst), 3, "and is left alone for a moment");
    }

    #[tokio::test]
    async fn a_failure_is_shared_by_all_who_wait_for_it() {
        let (cache, asked) = cache(&[]);
        let keys = futures_util::future::join_all((0..10).map(|_| key(&cache))).await;
        assert_eq!((keys, asked.load(Ordering::SeqCst)), (vec![None; 10], 1));
    }

    #[tokio::test]
    async fn those_that_ran_out_are_not_used() {
        let (cache, _) = cache(&[Some(Duration::ZERO)]);
        assert!(key(&cache).await.is_some());
        assert_eq!(key(&cache).await, None);
    }
}
