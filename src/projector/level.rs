//! How a node gets level with the log: before it says that something is not there.
//!
//! Other nodes write to the same log, and whoever was answered by one of them may ask this one at once. So what this node
//! does not find (a thread, a member, a seq, a ticket) may be in the log already, and not projected here. Before such an
//! answer the node asks where the log ends and waits until it has projected up to there; then it looks again. If that takes
//! too long, the answer is `unavailable`, which is temporary, and never a wrong one.
//!
//! Only answers of that kind pay for it. Questions to the log are shared: one at a time is under way, off the runtime's
//! workers, and whoever asks meanwhile shares the next one, so that any number of askers costs the log one question every few
//! milliseconds. A log that only this node writes to needs none of it: who was answered finds what was answered.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::Status;
use crate::log::Log;
use crate::protocol::error::{Code, Error};
use crate::telemetry;

/// How long an answer waits for the projector.
pub const LEVEL_WITHIN: Duration = Duration::from_secs(2);
/// Between two questions to the log.
const PAUSE: Duration = Duration::from_millis(2);

pub struct Level {
    log: Arc<dyn Log>,
    projector: Arc<Status>,
    askers: Mutex<Askers>,
}

#[derive(Default)]
struct Askers {
    /// A question is under way, or about to be.
    asking: bool,
    /// Who came since the last one began. They hear nothing but that the node is level; if it cannot be known, they are dropped.
    waiting: Vec<oneshot::Sender<()>>,
}

impl Level {
    pub fn new(log: Arc<dyn Log>, projector: Arc<Status>) -> Level {
        Level { log, projector, askers: Mutex::default() }
    }

    /// What `look` finds. If it finds nothing, it looks again once this node has whatever was in the log at that moment.
    pub async fn look<T>(self: &Arc<Level>, look: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
        match look() {
            Err(error) if self.may_be_missing(&error) => {
                self.reach().await?;
                look()
            }
            found => found,
        }
    }

    /// Whether other nodes write to the log: then what was acknowledged may not be here yet.
    pub fn others_write(&self) -> bool {
        self.log.has_other_writers()
    }

    /// Whether an answer may be due to what this node has not projected yet.
    pub fn may_be_missing(&self, error: &Error) -> bool {
        self.log.has_other_writers() && matches!(error.code, Code::NotFound | Code::CursorInvalid)
    }

    /// Returns once this node has projected whatever was in the log when this was called, or says that it could not be waited
    /// for.
    pub async fn reach(self: &Arc<Level>) -> Result<(), Error> {
        if !self.log.has_other_writers() {
            return Ok(());
        }
        let (sender, level) = oneshot::channel();
        let is_first = {
            let mut askers = self.askers();
            askers.waiting.push(sender);
            !std::mem::replace(&mut askers.asking, true)
        };
        if is_first {
            let asking = self.clone();
            // It ends by itself, and nobody waits for its end.
            drop(tokio::task::spawn_blocking(move || asking.ask()));
        }

        match timeout(LEVEL_WITHIN, level).await {
            Ok(Ok(())) => {
                telemetry::level_waits("level").increment(1);
                Ok(())
            }
            Ok(Err(_)) | Err(_) => {
                telemetry::level_waits("unavailable").increment(1);
                let why = "this node cannot tell now whether it has all that the log has";
                Err(Error::new(Code::Unavailable, why).retry_after(1_000))
            }
        }
    }

    /// Asks the log where it ends, for all who wait, and again for those who came meanwhile, until nobody waits.
    fn ask(&self) {
        let runtime = tokio::runtime::Handle::current();
        loop {
            let waiting = {
                let mut askers = self.askers();
                // Who has waited too long has gone.
                askers.waiting.retain(|asker| !asker.is_closed());
                if askers.waiting.is_empty() {
                    askers.asking = false;
                    return;
                }
                std::mem::take(&mut askers.waiting)
            };

            match self.log.ends() {
                Ok(ends) => {
                    let projector = self.projector.clone();
                    runtime.spawn(async move {
                        // After that nobody waits any more.
                        if timeout(LEVEL_WITHIN, projector.until_past(&ends)).await.is_ok() {
                            for asker in waiting {
                                // Who is gone need not hear it.
                                asker.send(()).unwrap_or(());
                            }
                        }
                    });
                }
                Err(error) => tracing::debug!(%error, "the log does not say where it ends"),
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn askers(&self) -> MutexGuard<'_, Askers> {
        // No section below can panic half way through a change.
        self.askers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
