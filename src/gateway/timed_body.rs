//! A total deadline for the body of a request that is forwarded and came over HTTP/2.
//!
//! Over HTTP/1.1 Pingora bounds the time of each read. Over HTTP/2 it waits for the client as long as the
//! connection lasts, and holds a connection to the upstream meanwhile. So the session is wrapped: reads of
//! the body fail at the deadline, and everything else is delegated to Pingora's session.

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;
use http::HeaderMap;
use pingora::http::{RequestHeader, ResponseHeader};
use pingora::prelude::Session;
use pingora::protocols::Digest;
use pingora::protocols::http::custom::CustomMessageWrite;
use pingora::protocols::http::custom::server::Session as CustomSession;
use pingora::protocols::http::v2::server::HttpSession;
use pingora::protocols::http::{HttpTask, ServerSession};
use pingora::protocols::l4::socket::SocketAddr;
use pingora::{Error, ErrorType, Result};
use std::future::Future;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Makes reads of the body fail after `deadline`, if the request came over HTTP/2 and its body is incomplete.
pub fn bound_body(session: &mut Session, deadline: Instant) {
    if !session.is_http2() || session.is_body_done() {
        return;
    }
    let slot = &mut *session.downstream_session;
    let placeholder = ServerSession::new_custom(Box::new(()));
    match std::mem::replace(slot, placeholder) {
        ServerSession::H2(session) => {
            let timed = TimedBody { session, deadline, read_timeout: None };
            *slot = ServerSession::new_custom(Box::new(timed));
        }
        other => *slot = other,
    }
}

struct TimedBody {
    session: HttpSession,
    deadline: Instant,
    /// Stored for the getter only: the total deadline replaces it.
    read_timeout: Option<Duration>,
}

/// The result of `read`, or a read timeout at the deadline.
async fn within<T>(deadline: Instant, read: impl Future<Output = Result<T>>) -> Result<T> {
    let late = || Error::explain(ErrorType::ReadTimedout, "the body missed its deadline").into_down();
    timeout_at(deadline, read).await.unwrap_or_else(|_| Err(late()))
}

#[async_trait]
impl CustomSession for TimedBody {
    async fn read_body_bytes(&mut self) -> Result<Option<Bytes>> {
        within(self.deadline, self.session.read_body_bytes()).await
    }

    async fn read_body_or_idle(&mut self, no_body_expected: bool) -> Result<Option<Bytes>> {
        if no_body_expected || self.session.is_body_done() {
            return self.session.read_body_or_idle(true).await;
        }
        self.read_body_bytes().await
    }

    async fn drain_request_body(&mut self) -> Result<()> {
        within(self.deadline, self.session.drain_request_body()).await
    }

    fn is_body_done(&mut self) -> bool {
        self.session.is_body_done()
    }

    fn is_body_empty(&mut self) -> bool {
        self.session.is_body_empty()
    }

    fn body_bytes_read(&self) -> usize {
        self.session.body_bytes_read()
    }

    fn body_bytes_sent(&self) -> usize {
        self.session.body_bytes_sent()
    }

    fn req_header(&self) -> &RequestHeader {
        self.session.req_header()
    }

    fn req_header_mut(&mut self) -> &mut RequestHeader {
        self.session.req_header_mut()
    }

    fn request_summary(&self) -> String {
        self.session.request_summary()
    }

    fn pseudo_raw_h1_request_header(&self) -> Bytes {
        self.session.pseudo_raw_h1_request_header()
    }

    async fn write_response_header(&mut self, head: Box<ResponseHeader>, end: bool) -> Result<()> {
        self.session.write_response_header(head, end)
    }

    async fn write_response_header_ref(&mut self, head: &ResponseHeader, end: bool) -> Result<()> {
        self.session.write_response_header_ref(head, end)
    }

    async fn write_body(&mut self, data: Bytes, end: bool) -> Result<()> {
        self.session.write_body(data, end).await
    }

    async fn write_trailers(&mut self, trailers: HeaderMap) -> Result<()> {
        self.session.write_trailers(trailers)
    }

    async fn response_duplex_vec(&mut self, tasks: Vec<HttpTask>) -> Result<bool> {
        self.session.response_duplex_vec(tasks).await
    }

    fn response_written(&self) -> Option<&ResponseHeader> {
        self.session.response_written()
    }

    async fn finish(&mut self) -> Result<()> {
        self.session.finish()
    }

    async fn finish_custom(&mut self) -> Result<()> {
        self.session.finish()
    }

    async fn shutdown(&mut self, _: u32, _: &str) {
        self.session.shutdown();
    }

    fn set_read_timeout(&mut self, timeout: Option<Duration>) {
        self.read_timeout = timeout;
    }

    fn get_read_timeout(&self) -> Option<Duration> {
        self.read_timeout
    }

    fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.session.set_write_timeout(timeout);
    }

    fn get_write_timeout(&self) -> Option<Duration> {
        self.session.get_write_timeout()
    }

    fn set_total_drain_timeout(&mut self, timeout: Option<Duration>) {
        self.session.set_total_drain_timeout(timeout);
    }

    fn get_total_drain_timeout(&self) -> Option<Duration> {
        self.session.get_total_drain_timeout()
    }

    fn digest(&self) -> Option<&Digest> {
        self.session.digest()
    }

    fn digest_mut(&mut self) -> Option<&mut Digest> {
        self.session.digest_mut()
    }

    fn client_addr(&self) -> Option<&SocketAddr> {
        self.session.client_addr()
    }

    fn server_addr(&self) -> Option<&SocketAddr> {
        self.session.server_addr()
    }

    fn enable_retry_buffering(&mut self) {
        self.session.enable_retry_buffering();
    }

    fn retry_buffer_truncated(&self) -> bool {
        self.session.retry_buffer_truncated()
    }

    fn get_retry_buffer(&self) -> Option<Bytes> {
        self.session.get_retry_buffer()
    }

    // Custom messages, which HTTP/2 does not have.

    fn take_custom_message_reader(
        &mut self,
    ) -> Option<Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>> {
        None
    }

    fn restore_custom_message_reader(
        &mut self,
        _: Box<dyn Stream<Item = Result<Bytes>> + Unpin + Send + Sync + 'static>,
    ) -> Result<()> {
        Ok(())
    }

    fn take_custom_message_writer(&mut self) -> Option<Box<dyn CustomMessageWrite>> {
        None
    }

    fn restore_custom_message_writer(&mut self, _: Box<dyn CustomMessageWrite>) -> Result<()> {
        Ok(())
    }
}
