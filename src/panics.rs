//! Panics. No data leads to one, so each is a bug: it is logged and counted, and its damage is bounded.
//!
//! - What works for one client (a session, a stream, a request, one read of the store) is caught by [`catch`] and
//!   [`catch_task`]. That client gets `internal`, and everybody else is served on.
//! - What the projector makes of one record is caught by [`caught`]: that record becomes a dead letter, and all others are
//!   projected ([`crate::projector`]).
//! - What else everybody depends on (the log's threads, the rest of the projector, the hub, the
//!   accept loop) ends the process by
//!   [`abort_on_panic`]: without it the server would seem to live, and what it was changing may be half changed. Nothing is
//!   lost by that: what was answered is in the log, and a start reads it.
//!
//! Tables that clients share are not left half changed by a panic: under each lock a change is made in one go.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::future::Future;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::Once;

use futures_util::FutureExt;

use crate::protocol::error::{Code, Error};
use crate::telemetry;

/// From here on every panic is logged and counted, wherever it is caught.
pub fn report() {
    static REPORTING: Once = Once::new();
    REPORTING.call_once(|| {
        // So that the series is there before the first panic, and an alert sees it increase.
        telemetry::panics().increment(0);
        std::panic::set_hook(Box::new(report_one));
    });
}

fn report_one(panic: &PanicHookInfo<'_>) {
    telemetry::panics().increment(1);
    let message = panic.payload_as_str().unwrap_or("no message");
    let location = panic.location().map(ToString::to_string).unwrap_or_default();
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or("unnamed");
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        tracing::error!(location, thread, %backtrace, "a panic, which is a bug: {message}");
    } else {
        tracing::error!(location, thread, "a panic, which is a bug: {message}");
    }
}

/// Runs what works for one client; an error for that client if it panics.
pub fn catch<T>(work: impl FnOnce() -> T) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| internal())
}

/// Runs what may panic; the panic's message if it does. What the work was changing may be half changed.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| {
        let text = payload.downcast_ref::<&str>().map(ToString::to_string);
        text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
    })
}

/// The same as [`catch`] for what waits in between.
pub async fn catch_task<T>(work: impl Future<Output = T>) -> Result<T, Error> {
    AssertUnwindSafe(work).catch_unwind().await.map_err(|_| internal())
}

fn internal() -> Error {
    Error::new(Code::Internal, "the server failed at this, and has reported it")
}

/// For as long as the returned guard is held, a panic of its thread or task ends the process.
#[must_use = "it holds only as long as it is kept"]
pub fn abort_on_panic(part: &'static str) -> AbortOnPanic {
    AbortOnPanic(part)
}

/// Runs a task that everybody depends on: a panic in it ends the process.
pub async fn vital<T>(part: &'static str, work: impl Future<Output = T>) -> T {
    let _guard = abort_on_panic(part);
    work.await
}

/// See [`abort_on_panic`].
pub struct AbortOnPanic(&'static str);

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("{} has panicked, and nothing works without it: the process ends", self.0);
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_and_what_does_not_panic_is_passed_on() {
        assert_eq!(catch(|| -> u8 { panic!("a bug") }).map_err(|error| error.code), Err(Code::Internal));
        assert_eq!(catch(|| 5).ok(), Some(5));
    }

    #[test]
    fn a_panic_s_message_is_kept() {
        let text = |n: u8| {
            caught(|| {
                if n > 0 {
                    panic!("bug {n}")
                }
            })
        };
        assert_eq!((text(0), text(1)), (Ok(()), Err("bug 1".to_owned())));
        assert_eq!(caught(|| panic!("a bug")), Err::<(), _>("a bug".to_owned()));
    }

    #[tokio::test]
    async fn a_task_s_panic_is_caught_also_after_it_has_waited() {
        let panics = async {
            tokio::task::yield_now().await;
            panic!("a bug")
        };
        assert_eq!(catch_task::<u8>(panics).await.map_err(|error| error.code), Err(Code::Internal));
        assert_eq!(catch_task(async { 5 }).await.ok(), Some(5));
    }
}
