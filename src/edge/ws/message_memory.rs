//! The memory of a message that is being read. A peer may send a part of a large one and no more, on each of its
//! connections; so a large message is charged to its user before more than its header is read, and must end in time. Before
//! the user is known, no message is large.

use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;

use crate::memory::{CONNECTION, Charge, Pool, Refused};

/// What a message may take that is not charged: an open connection has so much.
const FREE: usize = CONNECTION;
/// How long a peer waits with its message for memory.
const WITHIN: Duration = Duration::from_secs(5);
/// How long a large message may take from its header to its end: the largest one at 13 KB/s.
const ENDS_WITHIN: Duration = Duration::from_secs(20);

pub struct MessageMemory {
    pool: Pool,
    /// Whom it is charged to, once that is known.
    user: Option<Arc<str>>,
    held: Option<Charge>,
    /// When the large message began that is being read.
    begun: Option<Instant>,
    asked: Option<BoxFuture<'static, Result<Charge, Refused>>>,
}

impl MessageMemory {
    pub fn new(pool: Pool) -> MessageMemory {
        MessageMemory { pool, user: None, held: None, begun: None, asked: None }
    }

    pub fn belongs_to(&mut self, user: &Arc<str>) {
        self.user = Some(user.clone());
    }

    /// Ready once there is memory for a message of so many bytes.
    pub fn poll_charged(&mut self, cx: &mut Context<'_>, bytes: usize) -> Poll<Result<(), Refused>> {
        if bytes > FREE {
            self.begun.get_or_insert_with(Instant::now);
        }
        let held = self.held.as_ref().map_or(FREE, Charge::bytes);
        if bytes <= held {
            return Poll::Ready(Ok(()));
        }
        let Some(user) = &self.user else { return Poll::Ready(Err(Refused::TooLarge)) };
        // A message in several frames tells its size piece by piece. Whoever holds some of it does not wait for the rest.
        if let Some(held) = &mut self.held {
            return Poll::Ready(held.grow_to(bytes));
        }
        let asked = self.asked.get_or_insert_with(|| {
            let (pool, user) = (self.pool.clone(), user.clone());
            Box::pin(async move { pool.charge(&user, bytes, WITHIN).await })
        });
        let charged = ready!(asked.as_mut().poll(cx));
        self.asked = None;
        self.held = Some(charged?);
        Poll::Ready(Ok(()))
    }

    /// The message was dealt with.
    pub fn give_back(&mut self) {
        self.held = None;
        self.begun = None;
    }

    /// The time of the message that is being read counts anew once it is read on.
    pub fn stop_clock(&mut self) {
        self.begun = None;
    }

    /// Whether a large message has taken too long.
    pub fn is_overdue(&self, now: impl FnOnce() -> Instant) -> bool {
        self.begun.is_some_and(|begun| now().saturating_duration_since(begun) > ENDS_WITHIN)
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    const MIB: usize = 1 << 20;

    #[tokio::test]
    async fn large_messages_wait_for_memory_and_small_ones_do_not() {
        let pool = Pool::new(16 * MIB);
        let cx = &mut Context::from_waker(Waker::noop());
        let (mut one, mut two) = (MessageMemory::new(pool.clone()), MessageMemory::new(pool.clone()));
        assert_eq!(one.poll_charged(cx, FREE + 1), Poll::Ready(Err(Refused::TooLarge)), "whose is it?");
        one.give_back();
        one.belongs_to(&"acme/ada".into());
        two.belongs_to(&"acme/ada".into());
        assert_eq!(one.poll_charged(cx, 9 * MIB), Poll::Ready(Ok(())));
        assert_eq!(pool.usage().used, 9 * MIB);
        assert_eq!(two.poll_charged(cx, FREE), Poll::Ready(Ok(())), "what every connection has");
        assert!(two.poll_charged(cx, 5 * MIB).is_pending(), "three quarters are one tenant's");
        assert_eq!(one.poll_charged(cx, 9 * MIB), Poll::Ready(Ok(())), "it has that");
        one.give_back();
        assert_eq!(two.poll_charged(cx, 5 * MIB), Poll::Ready(Ok(())));
        assert_eq!(pool.usage().used, 5 * MIB);
        assert_eq!(two.poll_charged(cx, 6 * MIB), Poll::Ready(Ok(())), "it grows with the next frame of the message");
        assert_eq!(two.poll_charged(cx, 14 * MIB), Poll::Ready(Err(Refused::TooLarge)));
        let later = Instant::now() + ENDS_WITHIN + Duration::from_secs(1);
        assert!(two.is_overdue(|| later) && !two.is_overdue(Instant::now));
        one.give_back();
        assert!(!one.is_overdue(|| later));
        drop((one, two));
        assert_eq!(pool.usage().used, 0);
    }
}
