//! The credentials of direct calls: from the SDK's chain, kept until shortly before they run out.

use super::super::error::credentials_class;
use crate::backend::BackendError;
use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// Credentials are asked for anew so long before they run out: a signature must be good when it arrives.
const REFRESH_EARLY: Duration = Duration::from_secs(60);
/// Those that never run out are asked for anew after this, as the SDK does: the file may say something else by now.
const KEPT_MAX: Duration = Duration::from_secs(15 * 60);
/// After a failure the old ones are used so long before the next try.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);

pub(in super::super) struct CredentialCache {
    provider: SharedCredentialsProvider,
    kept: Mutex<Option<Kept>>,
    /// Held by the one who asks the provider.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct Kept {
    credentials: Arc<Credentials>,
    refresh_at: SystemTime,
}

impl CredentialCache {
    pub(in super::super) fn new(provider: SharedCredentialsProvider) -> Self {
        Self { provider, kept: Mutex::default(), asking: tokio::sync::Mutex::default() }
    }

    /// Credentials that are still good.
    pub(super) async fn get(&self) -> Result<Arc<Credentials>, BackendError> {
        if let Some(credentials) = self.fresh() {
            return Ok(credentials);
        }
        let _only_one = self.asking.lock().await;
        // Another one may have asked while we waited.
        if let Some(credentials) = self.fresh() {
            return Ok(credentials);
        }
        match self.provider.provide_credentials().await {
            Ok(credentials) => {
                let expiry = credentials.expiry().and_then(|at| at.checked_sub(REFRESH_EARLY));
                let latest = SystemTime::now() + KEPT_MAX;
                let refresh_at = expiry.map_or(latest, |at| at.min(latest));
                let credentials = Arc::new(credentials);
                *self.kept() = Some(Kept { credentials: Arc::clone(&credentials), refresh_at });
                Ok(credentials)
            }
            Err(error) => {
                tracing::warn!(error = %credentials_class(&error), "Credentials Not Refreshed");
                self.use_old().ok_or_else(|| credentials_class(&error))
            }
        }
    }

    /// The next call asks the provider.
    pub(super) fn forget(&self) {
        if let Some(kept) = self.kept().as_mut() {
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
    fn use_old(&self) -> Option<Arc<Credentials>> {
        let mut kept = self.kept();
        let old = kept.as_mut()?;
        let now = SystemTime::now();
        if old.credentials.expiry().is_some_and(|at| at <= now) {
            return None;
        }
        old.refresh_at = now + PAUSE_AFTER_FAILURE;
        Some(Arc::clone(&old.credentials))
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

    /// Gives credentials of these lifetimes, then fails.
    #[derive(Debug)]
    struct Chain {
        lifetimes: Vec<Option<Duration>>,
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
                None => Err(CredentialsError::not_loaded("gone")),
            })
        }
    }

    fn cache(lifetimes: &[Option<Duration>]) -> (CredentialCache, Arc<AtomicUsize>) {
        let asked = Arc::<AtomicUsize>::default();
        let chain = Chain { lifetimes: lifetimes.to_vec(), asked: Arc::clone(&asked) };
        (CredentialCache::new(SharedCredentialsProvider::new(chain)), asked)
    }

    async fn key(cache: &CredentialCache) -> Option<String> {
        Some(cache.get().await.ok()?.access_key_id().to_owned())
    }

    #[tokio::test]
    async fn they_are_asked_for_once_while_they_last() {
        let (cache, asked) = cache(&[None, Some(Duration::from_secs(3600))]);
        for _ in 0..3 {
            assert_eq!(key(&cache).await.as_deref(), Some("AK0"));
        }
        assert_eq!(asked.load(Ordering::SeqCst), 1);
        cache.forget();
        assert_eq!(key(&cache).await.as_deref(), Some("AK1"));
        assert_eq!(key(&cache).await.as_deref(), Some("AK1"));
        assert_eq!(asked.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn those_about_to_run_out_are_replaced_or_used_to_the_end() {
        let (cache, asked) = cache(&[Some(Duration::from_secs(30)), Some(Duration::from_secs(20))]);
        assert_eq!(key(&cache).await.as_deref(), Some("AK0"));
        assert_eq!(key(&cache).await.as_deref(), Some("AK1"));
        for _ in 0..3 {
            assert_eq!(key(&cache).await.as_deref(), Some("AK1"), "the provider fails now");
        }
        assert_eq!(asked.load(Ordering::SeqCst), 3, "and is left alone for a moment");
    }

    #[tokio::test]
    async fn those_that_ran_out_are_not_used() {
        let (cache, _) = cache(&[Some(Duration::ZERO)]);
        assert!(key(&cache).await.is_some());
        assert_eq!(key(&cache).await, None);
    }
}
