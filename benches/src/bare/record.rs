//! The record that the bare measurements write.

/// A record's value as a server appends it, with 256 bytes of data.
pub(super) fn record_value() -> String {
    let content = "x".repeat(226);
    format!(
        r#"{{"tenant":"bench","thread":"ack-1x1024-0f3a9c21-0","kind":"user_message","event":"019e0c1a-7b3c-7000-8000-0123456789ab","from":"ack-1x1024-0f3a9c21-0","at":"2026-11-22T12:37:00.000Z","data":{{"n":1000000000,"content":"{content}"}}}}"#
    )
}
