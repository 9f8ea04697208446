//! The messages that wait for one watcher.

use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::VecDeque;
use tokio::sync::Notify;

/// Pieces and bytes that wait for one watcher. Watchers with the same filter share the bytes. A watcher that
/// lets more wait is dropped.
const PIECES_MAX: usize = 128;
const BYTES_MAX: usize = 1 << 20;

/// A bounded queue with one reader.
#[derive(Default)]
pub struct PieceQueue {
    state: Mutex<QueuedPieces>,
    changed: Notify,
}

#[derive(Default)]
struct QueuedPieces {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    is_closed: bool,
}

impl PieceQueue {
    /// Adds a piece. If it does not fit, closes the queue, frees what waits, and returns `false`.
    pub fn push(&self, piece: Bytes) -> bool {
        let mut state = self.state.lock();
        let has_room = state.pieces.len() < PIECES_MAX && state.bytes + piece.len() <= BYTES_MAX;
        let fits = has_room && !state.is_closed;
        if fits {
            state.bytes += piece.len();
            state.pieces.push_back(piece);
        } else {
            *state = QueuedPieces { is_closed: true, ..QueuedPieces::default() };
        }
        drop(state);
        self.changed.notify_one();
        fits
    }

    /// Waits for the next piece. `None`: the queue is closed.
    pub async fn next(&self) -> Option<Bytes> {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.state.lock();
                if let Some(piece) = state.pieces.pop_front() {
                    state.bytes -= piece.len();
                    return Some(piece);
                }
                if state.is_closed {
                    return None;
                }
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pieces_arrive_in_order() {
        let queue = PieceQueue::default();
        assert!(queue.push("a".into()) && queue.push("b".into()));
        assert_eq!((queue.next().await, queue.next().await), (Some("a".into()), Some("b".into())));
        let (next, _) = tokio::join!(queue.next(), async { queue.push("c".into()) });
        assert_eq!(next, Some("c".into()));
    }

    #[tokio::test]
    async fn a_full_queue_is_closed() {
        let queue = PieceQueue::default();
        let pushed = (0..=PIECES_MAX).filter(|_| queue.push("x".into())).count();
        assert_eq!((pushed, queue.next().await), (PIECES_MAX, None));
        let queue = PieceQueue::default();
        assert!(queue.push(vec![0; BYTES_MAX].into()));
        assert!(!queue.push("x".into()));
        assert_eq!(queue.next().await, None);
        assert!(queue.state.lock().pieces.is_empty());
    }
}
