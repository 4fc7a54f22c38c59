//! The one door through which wall time and new ids come in.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

/// Wall time in milliseconds since the Unix epoch.
#[expect(clippy::disallowed_methods, reason = "this is the door")]
pub fn now_ms() -> u64 {
    // A clock before 1970 is taken as 1970: nothing here depends on it being right, only on it being a number.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

/// Wall time in seconds since the Unix epoch, as JWT has it.
pub fn now_s() -> u64 {
    now_ms() / 1000
}

/// A new event id: UUIDv7, so that ids sort by time.
#[expect(clippy::disallowed_methods, reason = "this is the door")]
pub fn event_id() -> Uuid {
    Uuid::now_v7()
}

/// A new random id.
pub fn random_id() -> Uuid {
    Uuid::new_v4()
}

/// A random number from 0 to 1, for jitter.
pub fn random_share() -> f64 {
    f64::from(random_id().as_fields().0) / f64::from(u32::MAX)
}

/// RFC 3339 with milliseconds, UTC: `2026-11-22T12:37:00.000Z`.
pub fn rfc3339(ms: u64) -> String {
    // The format ends with the year 9999; a token's `exp` may be later.
    const LAST: u64 = 253_402_300_799_999;
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms.min(LAST))).to_string()
}

/// Milliseconds since the Unix epoch of an RFC 3339 text in UTC.
pub fn parse_rfc3339(text: &str) -> Option<u64> {
    let time = humantime::parse_rfc3339(text).ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_millis() as u64)
}
