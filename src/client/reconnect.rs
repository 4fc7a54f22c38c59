//! How long a client waits before it connects again.

use std::time::Duration;

use super::ClientError;
use crate::clock;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A server that asks for a longer pause gets this one.
const LONGEST_ADVISED: Duration = Duration::from_secs(120);
/// How often the first question is asked, while the server calls its refusal temporary.
const FIRST_TRIES: u32 = 10;

#[derive(Debug, Default)]
pub(super) struct Reconnect {
    /// Connections in a row that failed before a frame came.
    failures: u32,
    /// The pause that the server asked for.
    advised: Option<Duration>,
}

impl Reconnect {
    /// A frame came. A server that accepts connections and then closes them would get them without a pause if an open
    /// connection were enough.
    pub fn heard(&mut self) {
        self.failures = 0;
    }

    /// A connection was lost; the error back if none can follow it.
    pub fn lost(&mut self, error: ClientError) -> Result<ClientError, ClientError> {
        self.advised = error.retry_after().map(|pause| pause.min(LONGEST_ADVISED));
        if error.reconnects() { Ok(error) } else { Err(error) }
    }

    /// Waits until it is time for the next connection.
    pub async fn pause(&mut self) {
        let own = (self.failures > 0).then(|| pause(self.failures));
        if let Some(pause) = self.advised.max(own) {
            tokio::time::sleep(pause).await;
        }
        self.advised = None;
        self.failures = self.failures.saturating_add(1);
    }

    /// Waits before the first connection is tried again, if that makes sense; else the error.
    pub async fn first_failed(tries: u32, error: ClientError) -> Result<(), ClientError> {
        match &error {
            ClientError::Command(refusal) if refusal.temporary && tries < FIRST_TRIES => {
                tokio::time::sleep(advised(refusal.retry_after_ms, tries).min(LONGEST_PAUSE)).await;
                Ok(())
            }
            _ => Err(error),
        }
    }
}

/// What the server asks for, or a pause that grows with each of so many tries.
pub(super) fn advised(retry_after_ms: Option<u64>, tries: u32) -> Duration {
    retry_after_ms.map_or_else(|| pause(tries), Duration::from_millis)
}

/// Doubles up to [`LONGEST_PAUSE`]; the upper half is random, so that clients of one server don't come back all at once.
fn pause(failures: u32) -> Duration {
    let whole = FIRST_PAUSE.saturating_mul(1 << failures.min(10).saturating_sub(1)).min(LONGEST_PAUSE);
    let half = whole / 2;
    half + half.mul_f64(f64::from(random()) / f64::from(u32::MAX))
}

/// The last 32 bits of a random UUID are all random.
pub(super) fn random() -> u32 {
    clock::random_id().as_u128() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end() {
        for (failures, whole) in [(1, 100), (2, 200), (7, 6400), (8, 10_000), (u32::MAX, 10_000)] {
            let pause = pause(failures).as_millis();
            assert!((whole / 2..=whole).contains(&pause), "{pause} ms after {failures}");
        }
    }
}
