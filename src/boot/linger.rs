//! Pingora, told to stop, closes every connection that waits for a request, be it one that was accepted a moment ago.
//! Where another process takes over, clients have no reason to fail: so the last connections are served for a while
//! after the listener is closed, each answer with `Connection: close`.

use async_trait::async_trait;
use pingora::apps::ServerApp;
use pingora::protocols::Stream;
use pingora::server::ShutdownWatch;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// An app whose connections outlive its listener for as long as `linger` says when that closes.
pub struct Lingering<A> {
    pub app: Arc<A>,
    pub linger: watch::Receiver<Duration>,
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServerApp for Lingering<A> {
    async fn process_new(self: &Arc<Self>, session: Stream, shutdown: &ShutdownWatch) -> Option<Stream> {
        self.app.process_new(session, shutdown).await
    }

    async fn cleanup(&self) {
        let linger = *self.linger.borrow();
        tokio::time::sleep(linger).await;
        self.app.cleanup().await;
    }
}
