//! Bodies that are produced while they are sent.
//!
//! They have no end of their own. So they end with what they depend on: the client, the key that opened them,
//! and the node, when it drains.

use super::api_key::{ApiKeys, AuthorizedKey};
use crate::api::ReplyStream;
use crate::lifecycle::{Lifecycle, Phase};
use pingora::prelude::Session;
use std::time::Duration;
use tokio::time::{Instant, interval_at, sleep, timeout};

/// How often the key of a stream is checked.
const KEY_CHECKED_EVERY: Duration = Duration::from_secs(15);
/// Time in which a client takes the end of a stream when the node drains.
const END_MAX: Duration = Duration::from_secs(1);

/// How a stream has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The body is complete: the node drains, or the handler has ended it.
    Complete,
    /// The body is complete, because the key is no longer valid, or may see other functions now.
    Key,
    /// The client has disconnected, or takes nothing of the body.
    Broken,
}

/// Writes the pieces until the stream ends or the node drains, and then the end of the body.
///
/// `key`: the key that opened the stream, if one was needed.
pub async fn write(
    session: &mut Session,
    mut stream: ReplyStream,
    key: Option<(&ApiKeys, AuthorizedKey)>,
    lifecycle: &Lifecycle,
) -> StreamEnd {
    let caller = key.as_ref().and_then(|(keys, pass)| keys.caller_of(pass));
    let still_opens = || {
        let Some((keys, pass)) = &key else { return true };
        // A key that may see fewer functions has to open a new stream.
        keys.caller_of(pass).zip(caller.as_ref()).is_some_and(|(now, then)| now.functions == then.functions)
    };
    let mut checks = interval_at(Instant::now() + KEY_CHECKED_EVERY, KEY_CHECKED_EVERY);
    let mut end = StreamEnd::Complete;
    loop {
        let piece = tokio::select! {
            biased;
            () = lifecycle.reached(Phase::Draining) => break,
            _ = checks.tick() => {
                if still_opens() {
                    continue;
                }
                end = StreamEnd::Key;
                break;
            }
            piece = stream.next() => piece,
            // The body of the request has been read, so this completes only when the client disconnects.
            _ = session.downstream_session.read_body_or_idle(true) => return StreamEnd::Broken,
        };
        let Some(piece) = piece else { break };
        let written = tokio::select! {
            biased;
            written = session.write_response_body(Some(piece), false) => written.is_ok(),
            () = drain_over(lifecycle) => false,
        };
        if !written {
            return StreamEnd::Broken;
        }
    }
    // The place of the watcher is free before the client knows the end.
    drop(stream);
    match timeout(END_MAX, session.write_response_body(None, true)).await {
        Ok(Ok(())) => end,
        _ => StreamEnd::Broken,
    }
}

/// Resolves when a client that takes nothing must not hold up the drain any longer.
async fn drain_over(lifecycle: &Lifecycle) {
    lifecycle.reached(Phase::Draining).await;
    sleep(END_MAX).await;
}
