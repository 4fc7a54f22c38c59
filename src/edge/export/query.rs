//! What of the tenant's threads an export shall have, as the request says it.

use crate::edge::http::request::{Query, Request};
use crate::protocol::error::Error;
use crate::protocol::ids::ThreadAddress;
use crate::views::export::Format;

/// Kinds that one export may name.
const MAX_KINDS: usize = 100;
/// The longest list of them, or of masks.
const MAX_LIST: usize = 8 << 10;

/// Where an export goes on.
pub struct ResumePoint {
    pub cursor: String,
    pub digest: [u8; 32],
}

pub struct ExportQuery {
    pub format: Format,
    pub thread: Option<String>,
    pub since: Option<(String, u64)>,
    pub until: Option<(String, u64)>,
    pub kinds: Option<(String, Vec<String>)>,
    pub from: Option<String>,
    /// As it was sent: compiling takes time, and is no part of reading a request.
    pub mask: Option<String>,
    /// Those of an export that is repeated.
    pub epoch: Option<String>,
    pub positions: Option<Vec<u64>>,
    pub resume: Option<ResumePoint>,
}

const PARAMETERS: [&str; 10] =
    ["format", "thread", "since", "until", "kinds", "from", "mask", "epoch", "positions", "cursor"];

impl ExportQuery {
    pub fn read(it: &Request) -> Result<ExportQuery, Error> {
        let query = it.query(&PARAMETERS)?;
        let wanted = ExportQuery {
            format: format(&query)?,
            thread: query.text("thread").map(|thread| named(it, thread)).transpose()?,
            since: time(&query, "since")?,
            until: time(&query, "until")?,
            kinds: kinds(&query)?,
            from: query.text("from").map(str::to_owned),
            mask: bounded(&query, "mask")?.map(str::to_owned),
            epoch: query.text("epoch").map(str::to_owned),
            positions: positions(&query)?,
            resume: query.text("cursor").map(resume_point).transpose()?,
        };
        if !wanted.format.has_events() {
            // Half of a run is no trace, and half of a conversation no conversation.
            let narrowed = [("kinds", wanted.kinds.is_some()), ("from", wanted.from.is_some())];
            if let Some((name, _)) = narrowed.into_iter().find(|(_, given)| *given) {
                return Err(Error::field(name, format!("{name} goes with the formats jsonl and csv alone")));
            }
        }
        if wanted.resume.is_some() && wanted.positions.is_none() {
            let why = "cursor goes with the positions of the export that it is of";
            return Err(Error::field("positions", why));
        }
        Ok(wanted)
    }
}

fn format(query: &Query<'_>) -> Result<Format, Error> {
    let Some(text) = query.text("format") else { return Ok(Format::Jsonl) };
    if text == "parquet" {
        return Err(Error::field("format", "parquet is not built into this server; it has jsonl, csv, otel and chat"));
    }
    let found = Format::ALL.into_iter().find(|(name, _)| *name == text);
    let why = || Error::field("format", format!("format must be jsonl, csv, otel or chat, not {text:.60}"));
    found.map(|(_, format)| format).ok_or_else(why)
}

fn named(it: &Request, thread: &str) -> Result<String, Error> {
    Ok(ThreadAddress::parse(&it.who.user, thread.to_owned())?.name)
}

/// A time, as it was sent as well.
fn time(query: &Query<'_>, name: &'static str) -> Result<Option<(String, u64)>, Error> {
    Ok(query.text(name).map(str::to_owned).zip(query.time(name)?))
}

fn kinds(query: &Query<'_>) -> Result<Option<(String, Vec<String>)>, Error> {
    let Some(text) = bounded(query, "kinds")? else { return Ok(None) };
    let kinds: Vec<String> = text.split(',').map(str::to_owned).collect();
    if kinds.len() > MAX_KINDS {
        return Err(Error::field("kinds", format!("kinds has at most {MAX_KINDS} entries")));
    }
    Ok(Some((text.to_owned(), kinds)))
}

fn bounded<'a>(query: &'a Query<'_>, name: &'static str) -> Result<Option<&'a str>, Error> {
    match query.text(name) {
        Some(text) if text.len() > MAX_LIST => {
            Err(Error::field(name, format!("{name} is longer than {MAX_LIST} bytes")))
        }
        text => Ok(text),
    }
}

fn positions(query: &Query<'_>) -> Result<Option<Vec<u64>>, Error> {
    let Some(text) = query.text("positions") else { return Ok(None) };
    let numbers: Result<Vec<u64>, _> = text.split(',').map(str::parse).collect();
    let why = |_| {
        Error::field("positions", "positions must be whole numbers with commas, as an export's first line has them")
    };
    numbers.map(Some).map_err(why)
}

/// A mark's `cursor`, a dot, and its `blake3`.
fn resume_point(text: &str) -> Result<ResumePoint, Error> {
    let parsed = text.rsplit_once('.').and_then(|(cursor, digest)| {
        let digest = *blake3::Hash::from_hex(digest).ok()?.as_bytes();
        Some(ResumePoint { cursor: cursor.to_owned(), digest })
    });
    parsed.ok_or_else(|| Error::field("cursor", "cursor must be a mark's cursor, a dot, and its blake3"))
}
