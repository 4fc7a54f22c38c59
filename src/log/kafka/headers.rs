//! A record as a Kafka message: key and value as they are, everything else in headers.

use std::ffi::CStr;

use bytes::Bytes;
use rdkafka::bindings;
use rdkafka::message::{BorrowedMessage, Header, Message, OwnedHeaders};

use crate::log::{Foreign, Grant, Plain, RULES, Record, Topic};

const KIND: &CStr = c"weft-kind";
const VERSION: &CStr = c"weft-version";
const GRANT: &CStr = c"weft-grant";
const TRACEPARENT: &CStr = c"traceparent";

pub(super) fn headers_of(record: &Record) -> OwnedHeaders {
    let header = |key, value| Header { key, value: Some(value) };
    let version = record.rules.to_string();
    let headers = OwnedHeaders::new_with_capacity(4)
        .insert(header("weft-kind", record.kind.as_str()))
        .insert(header("weft-version", version.as_str()))
        .insert(header("weft-grant", record.grant.as_str()));
    match &record.traceparent {
        Some(traceparent) => headers.insert(header("traceparent", traceparent.as_str())),
        None => headers,
    }
}

/// The version of the rules by which the record is judged, if that is newer than those known here. What else a newer version
/// changes in a record is not known, so nothing else of it is looked at.
pub(super) fn newer_rules(message: &BorrowedMessage<'_>) -> Option<u64> {
    version_of(message).filter(|version| *version > u64::from(RULES))
}

/// A version is a whole number; what is larger than any that will ever be counts as the largest.
fn version_of(message: &BorrowedMessage<'_>) -> Option<u64> {
    let text = std::str::from_utf8(last(message, VERSION)?).ok()?;
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().unwrap_or(u64::MAX))
}

/// The way back; what was written by another program is foreign.
pub(super) fn decode(topic: Topic, message: &BorrowedMessage<'_>) -> Result<Record, Foreign> {
    let foreign = |why: &str| Foreign {
        why: why.to_owned(),
        key: message.key().map(Bytes::copy_from_slice),
        value: message.payload().map(Bytes::copy_from_slice),
        at: time_of(message),
        plain: plain(topic, message).map(Box::new),
    };
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);

    if last(message, VERSION).is_none() {
        return Err(foreign("it has no header weft-version"));
    }
    let rules = match version_of(message).and_then(|version| u16::try_from(version).ok()) {
        Some(rules @ 1..=RULES) => rules,
        _ => return Err(foreign("its weft-version is none that there ever was")),
    };
    let kind = last(message, KIND).and_then(text).ok_or_else(|| foreign("it has no header weft-kind"))?;
    let grant =
        last(message, GRANT).and_then(Grant::parse).ok_or_else(|| foreign("it has no valid header weft-grant"))?;
    let key = message.key().and_then(text).ok_or_else(|| foreign("it has no key, or one that is not UTF-8"))?;
    let value = message.payload().ok_or_else(|| foreign("it has no value"))?;
    let traceparent = last(message, TRACEPARENT).and_then(text);

    Ok(Record { topic, key, kind, rules, grant, traceparent, value: Bytes::copy_from_slice(value) })
}

/// What the message says of itself if it may be another program's event: it lacks headers, and those that it has are right.
fn plain(topic: Topic, message: &BorrowedMessage<'_>) -> Option<Plain> {
    let version = last(message, VERSION);
    let rules = match version {
        Some(_) => {
            Some(version_of(message).and_then(|it| u16::try_from(it).ok()).filter(|it| (1..=RULES).contains(it))?)
        }
        None => None,
    };
    let grant = match last(message, GRANT) {
        Some(grant) => Grant::parse(grant).filter(|grant| *grant != Grant::Server)?,
        None => Grant::Scope,
    };
    let lacks = [VERSION, GRANT, KIND].iter().any(|name| last(message, name).is_none());
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
    let traceparent = last(message, TRACEPARENT).and_then(text);
    (lacks && topic == Topic::Events).then_some(Plain { rules, grant, traceparent, misplaced: false })
}

/// The version of the rules that the message names, if it is one that there is.
pub(super) fn rules_of(message: &BorrowedMessage<'_>) -> Option<u16> {
    version_of(message)?.try_into().ok()
}

/// The kind that the message's header names.
pub(super) fn kind_of<'m>(message: &'m BorrowedMessage<'_>) -> Option<&'m [u8]> {
    last(message, KIND)
}

/// When Kafka took the record, or its writer says that it was made.
pub(super) fn time_of(message: &BorrowedMessage<'_>) -> Option<u64> {
    message.timestamp().to_millis()?.try_into().ok()
}

/// The last header of that name. Not through rdkafka's own iterator, which panics over a name that is not UTF-8; another
/// program may write any.
#[expect(unsafe_code, reason = "the safe reader panics on a header whose name is not UTF-8")]
fn last<'m>(message: &'m BorrowedMessage<'_>, name: &CStr) -> Option<&'m [u8]> {
    let ok = bindings::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR;
    let (mut headers, mut value, mut len) = (std::ptr::null_mut(), std::ptr::null(), 0);
    // SAFETY: the message lives as long as the borrow, and owns its headers and their values; both calls write the
    // pointers they are given only when they return `ok`, and a null value is sorted out before it is read.
    unsafe {
        if bindings::rd_kafka_message_headers(message.ptr(), &mut headers) != ok
            || bindings::rd_kafka_header_get_last(headers, name.as_ptr(), &mut value, &mut len) != ok
            || value.is_null()
        {
            return None;
        }
        Some(std::slice::from_raw_parts(value.cast(), len))
    }
}
