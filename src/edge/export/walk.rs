//! The way through a tenant's threads, in turns: which events belong to an export, and their lines.
//!
//! An event belongs to it if its record stands before the export's positions in the log. Which record an event came of never
//! changes, and neither does a line once it was written: so the same positions give the same bytes, whatever was written since,
//! on every node and after every rebuild.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::query::ExportQuery;
use crate::auth::Principal;
use crate::clock;
use crate::edge::cursor::{self, check_epoch};
use crate::memory::{self, Charge};
use crate::protocol::error::{Code, Error};
use crate::protocol::event::StoredFrame;
use crate::protocol::json;
use crate::protocol::kinds::{AGENT_CANCELLED, AGENT_COMPLETED, AGENT_FAILED, TOOL_COMPLETED, TOOL_EXECUTING};
use crate::store::runs::{RunKey, RunRow};
use crate::store::{EventRange, EventRow, Store};
use crate::views::chat::CallResult;
use crate::views::export::chat::{PartEvent, put_part};
use crate::views::export::mask::{self, Masks};
use crate::views::export::otel::{self, SpanOwner};
use crate::views::export::{Format, Header, MARK_BYTES, Note, VERSION, Values, Writer, csv, put_event};

/// A turn ends once it has written so much, or looked at so many events or bytes of them.
const TURN_BYTES: usize = 256 << 10;
const LOOK: usize = 10_000;
const LOOK_BYTES: usize = 8 << 20;
/// There is a mark also once so many bytes of events were looked at since the seal before, each with so many beside its text:
/// where little is taken, an export that is cut off has come further, and its connection is not taken for one that has stalled.
/// A disk reads this in a few seconds.
const MARK_LOOK: usize = 32 << 20;
const ROW_BYTES: usize = 64;
/// Threads that are listed at once.
const THREADS: usize = 256;
/// A line of chat messages ends with the event that brings it to so many bytes, or events; or those that were looked at for
/// it, taken or not, to [`LOOK_BYTES`].
const PART_BYTES: usize = 256 << 10;
const PART_EVENTS: usize = 4_096;
/// An event larger than this is charged for itself, so many times: as it is, masked, and as what it becomes. So is what is
/// read beside it.
const LARGE: usize = 64 << 10;
const COPIES: usize = 6;
/// How far up the runs that a run works for are looked for.
const MAX_DEPTH: usize = 100;

pub struct Walk {
    store: Arc<Store>,
    tenant: Arc<str>,
    positions: Vec<u64>,
    filter: Filter,
    /// All events of threads, as they are.
    whole: bool,
    writer: Writer,
    /// The key of cursors' tags.
    key: [u8; 32],
    /// Threads that come next.
    listed: VecDeque<String>,
    /// After which more of them are listed; none if there are no more.
    list_after: Option<Option<String>>,
    open: Option<OpenThread>,
    lines: u64,
    threads: u64,
    /// Bytes that were looked at since the last seal. Only events that belong to the export's positions count, so that seals
    /// stand in the same places each time.
    looked_at: usize,
    finished: bool,
}

/// Which events, and what is hidden of them.
struct Filter {
    kinds: Option<Vec<String>>,
    since: Option<u64>,
    until: Option<u64>,
    from: Option<String>,
    masks: Option<Masks>,
}

/// A thread that is being read.
struct OpenThread {
    name: String,
    /// The position in the log of what is no longer in the export.
    end: u64,
    values: Values,
    /// Up to where it was looked at, and the link of the chain there.
    seq: u64,
    link: [u8; 32],
    /// Lines of it, and the seqs of the first and last.
    lines: u64,
    first: u64,
    last: u64,
    /// There is no more of it.
    is_over: bool,
}

/// What a mark says of where to go on.
#[derive(Serialize, Deserialize)]
struct Cursor {
    thread: String,
    seq: u64,
    /// Of the thread.
    lines: u64,
    first: u64,
    last: u64,
    /// Before the thread.
    all_lines: u64,
    all_threads: u64,
}

/// No export counts so far: from here on nothing overflows.
const MOST: u64 = 1 << 62;

impl Walk {
    pub fn begin(store: &Arc<Store>, epoch: &str, who: &Principal, query: ExportQuery) -> Result<Walk, Error> {
        check_epoch(query.epoch.as_deref(), epoch)?;
        let now = store.event_positions()?;
        let positions = match query.positions {
            None => now,
            Some(given) if given.len() == now.len() && given.iter().zip(&now).all(|(given, now)| given <= now) => given,
            Some(_) => {
                let why = "`positions` are not of this log, or beyond its end";
                return Err(Error::new(Code::CursorInvalid, why).at("positions"));
            }
        };
        let masks = query.mask.as_deref().map(Masks::parse).transpose().map_err(|why| Error::field("mask", why))?;
        let text = |it: &Option<(String, u64)>| it.as_ref().map(|(text, _)| text.clone());
        let header = Header {
            version: VERSION,
            format: query.format,
            tenant: who.tenant.to_string(),
            epoch: epoch.to_owned(),
            positions: positions.clone(),
            thread: query.thread.clone(),
            since: text(&query.since),
            until: text(&query.until),
            kinds: query.kinds.as_ref().map(|(text, _)| text.clone()),
            from: query.from.clone(),
            mask: query.mask.clone(),
        };
        let note = Note::Export(header.clone());
        let mut walk = Walk {
            store: store.clone(),
            tenant: who.tenant.clone(),
            positions,
            filter: Filter {
                kinds: query.kinds.map(|(_, kinds)| kinds),
                since: query.since.map(|(_, at)| at),
                until: query.until.map(|(_, at)| at),
                from: query.from,
                masks,
            },
            whole: header.is_whole(),
            writer: Writer::new(query.format, query.resume.as_ref().map(|it| it.digest)),
            key: blake3::derive_key("weft 2026-11 cursor of an export", json::encode(&note).as_bytes()),
            list_after: if query.thread.is_none() { Some(None) } else { None },
            listed: query.thread.into_iter().collect(),
            open: None,
            lines: 0,
            threads: 0,
            looked_at: 0,
            finished: false,
        };
        match query.resume {
            None => walk.writer.note(&note),
            Some(point) => walk.resume(&point.cursor)?,
        }
        Ok(walk)
    }

    pub fn format(&self) -> Format {
        self.writer.format
    }

    pub fn is_finished(&self) -> bool {
        self.finished
    }

    fn resume(&mut self, cursor: &str) -> Result<(), Error> {
        let refused = || Error::new(Code::CursorInvalid, "the cursor is not of this export").at("cursor");
        let text = cursor::open(&self.key, cursor).ok_or_else(refused)?;
        let at: Cursor = serde_json::from_slice(&text).map_err(|_| refused())?;
        // Whoever knows the first line can make a tag.
        if [at.seq, at.lines, at.all_lines, at.all_threads].iter().any(|it| *it > MOST) {
            return Err(refused());
        }
        if let Some(after) = &mut self.list_after {
            *after = Some(at.thread.clone());
        }
        self.listed.clear();
        let mut open = self.open_thread(at.thread);
        (open.seq, open.lines, open.first, open.last) = (at.seq, at.lines, at.first, at.last);
        let range = EventRange { from: at.seq, to: at.seq, limit: 1, ..EventRange::all() };
        self.store.visit_events(&self.tenant, &open.name, range, |_, row| {
            open.link = row.hash;
            Ok::<_, Error>(ControlFlow::Break(()))
        })?;
        (self.open, self.lines, self.threads) = (Some(open), at.all_lines, at.all_threads);
        Ok(())
    }

    fn open_thread(&self, name: String) -> OpenThread {
        let partition = self.store.partition(&self.tenant, &name).number() as usize;
        OpenThread {
            end: self.positions.get(partition).copied().unwrap_or_default(),
            values: Values::new(&self.tenant, &name),
            name,
            seq: 0,
            link: [0; 32],
            lines: 0,
            first: 0,
            last: 0,
            is_over: false,
        }
    }

    /// Goes on for a while; gives what was written meanwhile.
    pub fn turn(&mut self, charge: &mut Charge) -> Result<String, Error> {
        let mut turn = Turn { charge, events: 0, bytes: 0 };
        while !self.finished && self.writer.len() < TURN_BYTES && turn.may_go_on() {
            let Some(mut open) = self.open.take() else {
                self.next_thread(&mut turn)?;
                continue;
            };
            match self.format() {
                Format::Chat => self.part(&mut open, &mut turn)?,
                Format::Jsonl | Format::Csv | Format::Otel => self.events(&mut open, &mut turn)?,
            }
            match open.is_over {
                true => self.close(open),
                false => self.open = Some(open),
            }
        }
        Ok(self.writer.take())
    }

    fn next_thread(&mut self, turn: &mut Turn<'_>) -> Result<(), Error> {
        turn.events += 1;
        if let Some(name) = self.listed.pop_front() {
            self.open = Some(self.open_thread(name));
            return Ok(());
        }
        let Some(after) = &self.list_after else {
            self.writer.seal(&Note::End { lines: self.lines, threads: self.threads, blake3: None });
            self.finished = true;
            return Ok(());
        };
        let rows = self.store.threads_after(&self.tenant, after.as_deref(), THREADS)?;
        turn.events += rows.len();
        self.listed = rows.into_iter().map(|(name, _)| name).collect();
        self.list_after = (self.listed.len() == THREADS).then(|| self.listed.back().cloned());
        Ok(())
    }

    fn close(&mut self, open: OpenThread) {
        if open.lines == 0 {
            return;
        }
        self.lines += open.lines;
        self.threads += 1;
        if self.format().has_events() {
            let hash = blake3::Hash::from_bytes(open.link).to_hex().to_string();
            let OpenThread { name: thread, lines: events, first, last, seq: head, .. } = open;
            self.writer.note(&Note::Thread { thread, events, first, last, head, hash });
        }
    }

    /// Reads events one after the other, and writes what each becomes.
    fn events(&mut self, open: &mut OpenThread, turn: &mut Turn<'_>) -> Result<(), Error> {
        let (store, tenant, name) = (self.store.clone(), self.tenant.clone(), open.name.clone());
        let range = EventRange { from: open.seq + 1, ..EventRange::all() };
        open.is_over = true;
        store.visit_events(&tenant, &name, range, |seq, row| {
            if row.offset >= open.end {
                return Ok(ControlFlow::Break(()));
            }
            if self.writer.len() >= TURN_BYTES || !turn.may_go_on() {
                open.is_over = false;
                return Ok(ControlFlow::Break(()));
            }
            turn.look_at(row)?;
            let before = std::mem::replace(&mut open.link, row.hash);
            open.seq = seq;
            if self.filter.takes(row) {
                self.line(open, &before, row, turn)?;
            }
            self.looked_at += row.frame.len() + ROW_BYTES;
            self.mark(open);
            Ok::<_, Error>(ControlFlow::Continue(()))
        })
    }

    /// Writes what an event becomes.
    fn line(
        &mut self,
        open: &mut OpenThread,
        before: &[u8; 32],
        row: &EventRow<'_>,
        turn: &mut Turn<'_>,
    ) -> Result<(), Error> {
        let written = self.writer.len();
        match self.format() {
            Format::Jsonl => {
                let made = if self.whole { open.values.link(before, open.seq, row.frame) } else { None };
                let frame = self.filter.masked(row.frame)?;
                put_event(self.writer.out(), &frame, made, &row.hash, self.whole);
            }
            Format::Csv => csv::put_event(self.writer.out(), &self.filter.masked(row.frame)?, &row.hash),
            Format::Otel => self.span(open, row, turn)?,
            Format::Chat => {}
        }
        if self.writer.len() > written {
            open.count(open.seq);
        }
        Ok(())
    }

    /// A place to go on from, if it is time for one.
    fn mark(&mut self, open: &OpenThread) {
        if self.writer.since_seal() < MARK_BYTES && self.looked_at < MARK_LOOK {
            return;
        }
        self.looked_at = 0;
        let text = json::encode(&Cursor {
            thread: open.name.clone(),
            seq: open.seq,
            lines: open.lines,
            first: open.first,
            last: open.last,
            all_lines: self.lines,
            all_threads: self.threads,
        });
        let cursor = cursor::seal(&self.key, text.as_bytes());
        self.writer.seal(&Note::Mark { cursor, blake3: None });
    }

    /// The span that ends with an event, if one does. What it needs of the run does not change once the run has begun.
    fn span(&mut self, open: &OpenThread, row: &EventRow<'_>, turn: &mut Turn<'_>) -> Result<(), Error> {
        let ends_run = matches!(row.kind, AGENT_COMPLETED | AGENT_FAILED | AGENT_CANCELLED);
        if !(ends_run || row.kind == TOOL_COMPLETED) {
            return Ok(());
        }
        let Some(run) = StoredFrame::parse(row.frame).and_then(|frame| Some(frame.run?.into_owned())) else {
            return Ok(());
        };
        let key = RunKey::new(&self.tenant, &open.name, &run);
        let Some(found) = self.store.run(&key)? else { return Ok(()) };
        let root = self.root(&key, &found)?;
        let (tenant, thread, parent) = (&*self.tenant, &*open.name, found.parent.as_deref());
        let owner = SpanOwner { tenant, thread, run: &run, root: &root, parent };
        let call = StoredFrame::parse(row.frame).and_then(|frame| frame.fields().string("call"));
        let begun = match &call {
            Some(call) if !ends_run => self.store.call(&key, call)?.map(|row| row.begun.seq),
            _ => Some(found.started.seq),
        };
        let Some(begun) = begun.map(|seq| self.beside(row, open, seq, turn)).transpose()?.flatten() else {
            return Ok(());
        };
        let ended = self.filter.masked(row.frame)?;
        match &call {
            Some(call) if !ends_run => otel::put_call(self.writer.out(), &owner, call, &begun, &ended),
            _ => otel::put_run(self.writer.out(), &owner, &begun, &ended),
        }
        Ok(())
    }

    /// The run at the top: the one that all of it is done for.
    fn root(&self, key: &RunKey, row: &RunRow) -> Result<String, Error> {
        let (mut root, mut parent) = (key.run.to_string(), row.parent.clone());
        for _ in 0..MAX_DEPTH {
            let Some(above) = parent else { break };
            parent = self.store.run(&RunKey::new(&self.tenant, &key.thread, &above))?.and_then(|row| row.parent);
            root = above;
        }
        Ok(root)
    }

    /// Reads a part of a thread, and writes it as a line of chat messages.
    fn part(&mut self, open: &mut OpenThread, turn: &mut Turn<'_>) -> Result<(), Error> {
        let (store, tenant) = (self.store.clone(), self.tenant.clone());
        let (name, mut events) = (open.name.clone(), Vec::new());
        let (mut read, mut looked_at, mut bytes, mut is_cut) = (0, 0, 0, false);
        let range = EventRange { from: open.seq + 1, limit: PART_EVENTS, ..EventRange::all() };
        store.visit_events(&tenant, &name, range, |seq, row| {
            if row.offset >= open.end {
                is_cut = true;
                return Ok(ControlFlow::Break(()));
            }
            if bytes >= PART_BYTES || looked_at >= LOOK_BYTES {
                return Ok(ControlFlow::Break(()));
            }
            (open.seq, open.link) = (seq, row.hash);
            (read, looked_at) = (read + 1, looked_at + row.frame.len());
            turn.look_at(row)?;
            if self.filter.takes(row) {
                let result = self.result_of(row, open, turn)?;
                bytes += row.frame.len() + result.as_ref().map_or(0, |it| it.frame.len());
                let (kind, privileged) = (row.kind.to_owned(), row.privileged);
                events.push(PartEvent { seq, kind, privileged, frame: self.filter.masked(row.frame)?, result });
            }
            Ok::<_, Error>(ControlFlow::Continue(()))
        })?;
        open.is_over = is_cut || (read < PART_EVENTS && bytes < PART_BYTES && looked_at < LOOK_BYTES);
        let first = events.first().map_or(0, |event| event.seq);
        if put_part(self.writer.out(), &open.name, events) {
            open.count(first);
        }
        self.looked_at += looked_at + read * ROW_BYTES;
        self.mark(open);
        Ok(())
    }

    /// What a call came to, if that is in the export.
    fn result_of(
        &self,
        row: &EventRow<'_>,
        open: &OpenThread,
        turn: &mut Turn<'_>,
    ) -> Result<Option<CallResult>, Error> {
        if row.kind != TOOL_EXECUTING {
            return Ok(None);
        }
        let Some(frame) = StoredFrame::parse(row.frame) else { return Ok(None) };
        let (Some(run), Some(call)) = (frame.run.as_deref(), frame.fields().string("call")) else { return Ok(None) };
        let key = RunKey::new(&self.tenant, &open.name, run);
        let Some(done) = self.store.call(&key, &call)?.and_then(|row| row.done) else { return Ok(None) };
        let frame = self.beside(row, open, done.seq, turn)?;
        Ok(frame.map(|frame| CallResult { seq: done.seq, frame }))
    }

    /// The masked frame of an event that goes with the one in `row`, if it is in the export. Both are held at a time.
    fn beside(
        &self,
        row: &EventRow<'_>,
        open: &OpenThread,
        seq: u64,
        turn: &mut Turn<'_>,
    ) -> Result<Option<String>, Error> {
        let range = EventRange { from: seq, to: seq, limit: 1, ..EventRange::all() };
        let mut frame = None;
        self.store.visit_events(&self.tenant, &open.name, range, |_, found| {
            if found.offset < open.end {
                turn.hold(row.frame.len() + found.frame.len())?;
                frame = Some(self.filter.masked(found.frame)?);
            }
            Ok::<_, Error>(ControlFlow::Break(()))
        })?;
        Ok(frame)
    }
}

/// What a turn has looked at, and what it is charged for.
struct Turn<'a> {
    charge: &'a mut Charge,
    events: usize,
    bytes: usize,
}

impl Turn<'_> {
    fn may_go_on(&self) -> bool {
        self.events < LOOK && self.bytes < LOOK_BYTES
    }

    fn look_at(&mut self, row: &EventRow<'_>) -> Result<(), Error> {
        self.events += 1;
        self.bytes += row.frame.len();
        self.hold(row.frame.len())
    }

    /// Charges what events of so many bytes take. Nobody may have more than the largest charge: whoever could not be charged
    /// for an event would never get past it.
    fn hold(&mut self, bytes: usize) -> Result<(), Error> {
        if bytes <= LARGE {
            return Ok(());
        }
        let no_memory = |_| Error::new(Code::Unavailable, "the server has no memory left for this export");
        self.charge.grow_to((super::TURN_MEMORY + bytes * COPIES).min(memory::LARGEST)).map_err(no_memory)
    }
}

impl OpenThread {
    fn count(&mut self, seq: u64) {
        if self.lines == 0 {
            self.first = seq;
        }
        self.lines += 1;
        self.last = self.seq;
    }
}

impl Filter {
    fn takes(&self, row: &EventRow<'_>) -> bool {
        let is_of_kind = self.kinds.as_ref().is_none_or(|kinds| kinds.iter().any(|kind| kind == row.kind));
        if !is_of_kind {
            return false;
        }
        if self.since.is_none() && self.until.is_none() && self.from.is_none() {
            return true;
        }
        let Some(frame) = StoredFrame::parse(row.frame) else { return false };
        let at = clock::parse_rfc3339(&frame.at).unwrap_or_default();
        self.since.is_none_or(|since| at >= since)
            && self.until.is_none_or(|until| at < until)
            && self.from.as_deref().is_none_or(|from| from == frame.from)
    }

    fn masked(&self, frame: &str) -> Result<String, Error> {
        let Some(masks) = &self.masks else { return Ok(frame.to_owned()) };
        masks.frame(frame, mask::WITHIN).map_err(|_| {
            let seconds = mask::WITHIN.as_secs();
            Error::field("mask", format!("mask takes longer than {seconds} s for an event: make its regexes simpler"))
        })
    }
}
