//! The cursors that clients come back with: whether one is of this log, and where reading begins after it; and those that the
//! server makes, with a tag. Pure.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use warp::http::{HeaderMap, HeaderValue};

use crate::protocol::error::{Code, Error};

/// The header that says which epoch the seqs of an answer are of.
const EPOCH: &str = "weft-epoch";
const TAG: usize = 8;

/// A place as a cursor, with a tag that binds it to what `key` is made of.
pub fn seal(key: &[u8; 32], place: &[u8]) -> String {
    URL_SAFE_NO_PAD.encode([&tag(key, place)[..], place].concat())
}

/// The place of a cursor that was made with this key.
pub fn open(key: &[u8; 32], cursor: &str) -> Option<Vec<u8>> {
    let bytes = URL_SAFE_NO_PAD.decode(cursor).ok()?;
    let (given, place) = bytes.split_first_chunk::<TAG>()?;
    (tag(key, place) == *given).then(|| place.to_vec())
}

fn tag(key: &[u8; 32], place: &[u8]) -> [u8; TAG] {
    let mut tag = [0; TAG];
    tag.copy_from_slice(&blake3::keyed_hash(key, place).as_bytes()[..TAG]);
    tag
}

/// Whether cursors from `epoch` mean something in this log. Without an epoch they are taken as this log's.
pub fn recovers(epoch: Option<&str>, of_log: &str) -> bool {
    epoch.is_none_or(|epoch| epoch == of_log)
}

/// Refuses cursors of another epoch, where an answer has no place to say that it does not continue what was before.
pub fn check_epoch(epoch: Option<&str>, of_log: &str) -> Result<(), Error> {
    match epoch {
        Some(epoch) if !recovers(Some(epoch), of_log) => {
            let why = format!(
                "`epoch` ({epoch:.100}) is not the log's ({of_log}): cursors from there mean nothing here, read the thread anew"
            );
            Err(Error::new(Code::CursorInvalid, why).at("epoch"))
        }
        _ => Ok(()),
    }
}

/// The seq after which reading begins in a thread with this head.
pub fn first_cursor(head: u64, after: Option<u64>, last: Option<u64>, recovered: bool) -> Result<u64, Error> {
    if !recovered {
        // A cursor of another log says nothing about this one.
        return Ok(head);
    }
    match after {
        Some(after) if after > head => Err(beyond_head("after", after, head)),
        Some(after) => Ok(after),
        None => Ok(head.saturating_sub(last.unwrap_or(0))),
    }
}

/// The answer to a seq that the thread has not come to.
pub fn beyond_head(field: &'static str, sent: u64, head: u64) -> Error {
    Error::new(Code::CursorInvalid, format!("`{field}` ({sent}) is beyond the thread's head ({head})")).at(field)
}

/// Says in the head of an answer which epoch its seqs are of.
pub fn name_epoch(headers: &mut HeaderMap, epoch: &str) {
    // An epoch is ASCII.
    headers.extend(HeaderValue::try_from(epoch).ok().map(|epoch| (warp::http::HeaderName::from_static(EPOCH), epoch)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_the_client_s_or_counts_from_the_head() {
        assert_eq!(first_cursor(10, Some(4), None, true), Ok(4));
        assert_eq!(first_cursor(10, None, None, true), Ok(10));
        assert_eq!(first_cursor(10, None, Some(3), true), Ok(7));
        assert_eq!(first_cursor(10, None, Some(u64::MAX), true), Ok(0));
        assert_eq!(first_cursor(10, Some(99), None, false), Ok(10), "another log's cursor");
        let refused = first_cursor(4, Some(9), None, true).expect_err("beyond the head");
        assert_eq!(
            (refused.code, &*refused.message),
            (Code::CursorInvalid, "`after` (9) is beyond the thread's head (4)")
        );
    }

    #[test]
    fn an_epoch_is_the_log_s_to_the_letter_or_another_one() {
        assert!(recovers(None, "a.2-x") && recovers(Some("a.2-x"), "a.2-x"));
        for other in ["", "a", "a.2-y", "a.2-x ", "A.2-x"] {
            assert!(!recovers(Some(other), "a.2-x"), "{other}");
            let refused = check_epoch(Some(other), "a.2-x").expect_err(other);
            assert_eq!((refused.code, refused.field.as_deref()), (Code::CursorInvalid, Some("epoch")));
        }
        assert_eq!((check_epoch(None, "a.2-x"), check_epoch(Some("a.2-x"), "a.2-x")), (Ok(()), Ok(())));
    }
}
