//! The ports over subscriptions, and the ports of which nothing is asserted.

use super::network::call;
use super::process::{Inbox, Process};
use super::world::{Service, world};
use crate::ambient::replaced::ProcessNumber;
use crate::backend::{
    BackendError, ChangeEvent, ChangeFeed, HeartbeatOutcome, NodeSummaries, ResultEvent, Results,
    StoredSummary, SubscriptionState, WorkerRecord, WorkerRegistry,
};
use crate::model::{JobId, NodeId};
use async_trait::async_trait;
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// How often a wait for a job of another node looks for the stored result.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Results: the subscription of a process, and the stored copies as `stored` reads them from Redis.
pub struct SimulatedResults {
    process: ProcessNumber,
    stored: Arc<dyn Results>,
}

impl SimulatedResults {
    pub fn new(process: ProcessNumber, stored: Arc<dyn Results>) -> Self {
        Self { process, stored }
    }
}

/// Waits for the next event of a subscription, and subscribes again while it is broken.
async fn next<T>(
    process: ProcessNumber,
    inbox: fn(&mut Process) -> &mut Inbox<T>,
    on_subscribed: fn(&mut Inbox<T>),
) -> T {
    loop {
        let (event, is_subscribed, arrived) = world(|world| {
            let inbox = inbox(&mut world.processes.all[process.0]);
            (inbox.events.pop_front(), inbox.is_subscribed, Arc::clone(&inbox.arrived))
        });
        if let Some(event) = event {
            return event;
        }
        if is_subscribed {
            arrived.notified().await;
            continue;
        }
        if call(Service::Redis, "subscribe", |_| ()).await.is_err() {
            sleep(world(|world| world.millis(50..1000))).await;
            continue;
        }
        world(|world| {
            let inbox = inbox(&mut world.processes.all[process.0]);
            inbox.is_subscribed = true;
            on_subscribed(inbox);
        });
    }
}

#[async_trait]
impl Results for SimulatedResults {
    async fn next(&self) -> ResultEvent {
        let on_subscribed = |inbox: &mut Inbox<ResultEvent>| {
            inbox.push(ResultEvent::Subscribed);
            inbox.push(ResultEvent::Subscription(SubscriptionState::Verified));
        };
        next(self.process, |process| &mut process.results, on_subscribed).await
    }

    async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError> {
        self.stored.stored(ids).await
    }

    async fn store(&self, id: JobId, result: &Bytes) -> Result<(), BackendError> {
        self.stored.store(id, result).await
    }

    async fn stored_foreign(&self, request_id: &str) -> Result<Option<Bytes>, BackendError> {
        self.stored.stored_foreign(request_id).await
    }

    async fn wait_for(&self, id: JobId) -> Result<Bytes, BackendError> {
        loop {
            if let Ok(mut stored) = self.stored.stored(&[id]).await
                && let Some(Some(result)) = stored.pop()
            {
                return Ok(result);
            }
            sleep(LOOK_EVERY).await;
        }
    }

    fn store_name(&self) -> &'static str {
        "redis"
    }

    async fn ping(&self) -> Result<(), BackendError> {
        self.stored.ping().await
    }
}

/// The announcements of changed functions.
pub struct Changes(pub ProcessNumber);

#[async_trait]
impl ChangeFeed for Changes {
    async fn announce(&self, id: &str) -> Result<(), BackendError> {
        let channel = format!("changed:{id}");
        Ok(call(Service::Redis, "announce", move |world| world.publish(&channel, Vec::new())).await?)
    }

    async fn next(&self) -> ChangeEvent {
        let on_subscribed = |inbox: &mut Inbox<ChangeEvent>| {
            inbox.push(ChangeEvent::Subscription(SubscriptionState::Verified));
        };
        next(self.0, |process| &mut process.changes, on_subscribed).await
    }
}

/// The registry of workers.
pub struct WorkerList;

#[async_trait]
impl WorkerRegistry for WorkerList {
    async fn put(&self, _: &str, _: &str) -> Result<HeartbeatOutcome, BackendError> {
        Ok(HeartbeatOutcome::Stored { before: None })
    }

    async fn all(&self) -> Result<Vec<WorkerRecord>, BackendError> {
        Ok(Vec::new())
    }

    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError> {
        Ok(None)
    }
}

/// The summaries of the nodes. The loop that writes them is not a part of the engine, and does not run.
pub struct NoSummaries;

#[async_trait]
impl NodeSummaries for NoSummaries {
    async fn write(&self, _: NodeId, _: Bytes) -> Result<bool, BackendError> {
        Ok(true)
    }

    async fn all(&self) -> Result<Vec<StoredSummary>, BackendError> {
        Ok(Vec::new())
    }
}
