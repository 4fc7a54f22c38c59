//! Search: the events that have what somebody looks for, with where it stands and what is around it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use warp::http::StatusCode;

use super::meter::Meter;
use super::page::{COPIES, EVENT_BYTES, PAGE_BYTES, Page, SortKey};
use super::reply::{Reply, charged, json};
use super::request::Request;
use super::{Api, if_readable};
use crate::auth::Principal;
use crate::clock;
use crate::edge::blocking;
use crate::protocol::command::MAX_SEARCH;
use crate::protocol::error::{Code, Error};
use crate::protocol::event::{StoredFrame, without_type};
use crate::protocol::http::{Highlight, SearchHit, SearchPage};
use crate::protocol::ids::ThreadAddress;
use crate::search::document::{self, Piece};
use crate::search::{After, Ask, Filters, Found, Hit, Key, Order, Ranked, Search, Statistics, Threads};
use crate::store::{EventRange, StoreError, StoredEvent};

/// Hits of a page unless said, and at most.
pub const HITS: usize = 20;
pub const MAX_HITS: usize = 100;
/// Events before a hit, and as many after it.
pub const MAX_AROUND: usize = 10;
/// Texts of one hit that are shown, and characters of each.
const TEXTS: usize = 4;
const SHOWN: usize = 240;
/// Characters before what was found, if a text is cut.
const BEFORE: usize = 60;
/// What the name of a thread takes while it is looked for in it.
const THREAD_BYTES: usize = 128;

const PARAMETERS: [&str; 11] =
    ["q", "thread", "from", "kind", "run", "since", "until", "order", "around", "limit", "cursor"];

/// What a request asks for.
struct Wanted {
    ask: Ask,
    around: usize,
    page: Page<Cursor>,
}

impl Wanted {
    fn read(api: &Api, it: &Request) -> Result<Wanted, Error> {
        let query = it.query(&PARAMETERS)?;
        let q = query.text("q").ok_or_else(|| Error::field("q", "q is missing: what to search for"))?;
        if q.chars().count() > MAX_SEARCH {
            return Err(Error::field("q", format!("q has at most {MAX_SEARCH} characters")));
        }
        let text = |name| query.text(name).map(str::to_owned);
        let thread = text("thread").map(|thread| ThreadAddress::parse(&it.who.user, thread)).transpose()?;
        let order = query.one_of("order", &["newest", "relevance"])?;
        let around = match query.text("around") {
            Some("0") | None => 0,
            Some(_) => query.up_to("around", MAX_AROUND, 0)?,
        };

        let names = ["thread", "from", "kind", "run", "since", "until"];
        let filters: Vec<&str> =
            [q, order].into_iter().chain(names.map(|name| query.text(name).unwrap_or("\0"))).collect();
        let mut page = Page::<Cursor>::read(&query, &it.who, &api.epoch, "search", &filters)?;
        page.limit = query.up_to("limit", MAX_HITS, HITS)?;
        let filters = Filters {
            thread: thread.map(|thread| thread.name),
            from: text("from"),
            kind: text("kind"),
            run: text("run"),
            since: query.time("since")?,
            until: query.time("until")?,
        };
        let ask = Ask {
            tenant: it.who.tenant.to_string(),
            q: q.to_owned(),
            filters,
            order: if order == "newest" { Order::Newest } else { Order::Relevance },
            limit: page.limit,
            after: page.after.as_ref().map(|cursor| cursor.0.clone().into()),
        };
        Ok(Wanted { ask, around, page })
    }

    /// Whether nothing was found, or only what may have been meant in its place, by a search that is not the next page of one.
    fn may_lack(&self, found: &Found) -> bool {
        found.hits.is_empty() || (found.corrected.is_some() && self.ask.after.is_none())
    }
}

/// `GET /v1/search`
pub async fn find(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let begun = Instant::now();
    let search = api.search.clone();
    let search = search.ok_or_else(|| Error::new(Code::NotFound, "search is off on this server"))?;
    let wanted = Wanted::read(&api, &it)?;
    // What is wrong with it is said before anything is waited for.
    search.parse(&wanted.ask.q)?;
    if let Some(thread) = &wanted.ask.filters.thread {
        api.rights.readable(&it.who, thread).map_err(|error| error.at("thread"))?;
    }
    let events = wanted.page.limit * (1 + 2 * wanted.around);
    let meter = api.meter(&it.who, (events * EVENT_BYTES).min(PAGE_BYTES) * COPIES).await?;
    let mut looked = look_in_turn(&api, &search, &it.who, &wanted.ask, meter).await?;
    if wanted.may_lack(&looked.0) && api.level.others_write() {
        // What another node has acknowledged may not be here yet.
        api.level.reach().await?;
        looked = look_in_turn(&api, &search, &it.who, &wanted.ask, looked.1).await?;
    }
    let (found, meter) = looked;
    blocking(move || answer(&api, &search, &it.who, &wanted, found, meter, begun)).await
}

/// Waits for a turn, and looks.
async fn look_in_turn(
    api: &Arc<Api>,
    search: &Arc<Search>,
    who: &Principal,
    ask: &Ask,
    mut meter: Meter,
) -> Result<(Found, Meter), Error> {
    let _turn = search.turn(&who.key).await?;
    let (api, search, who, ask) = (api.clone(), search.clone(), who.clone(), ask.clone());
    blocking(move || Ok((look(&api, &search, &who, &ask, &mut meter)?, meter))).await
}

/// What is found in the threads that the user may read now.
fn look(api: &Api, search: &Search, who: &Principal, ask: &Ask, meter: &mut Meter) -> Result<Found, Error> {
    let threads = match &ask.filters.thread {
        // Looked at already, and again for each hit.
        Some(_) => None,
        None => api.rights.readable_threads(who)?,
    };
    let threads = match threads {
        None => Threads::All,
        Some(threads) => {
            meter.add(threads.len() * THREAD_BYTES)?;
            Threads::These(threads)
        }
    };
    search.find(ask, threads)
}

fn answer(
    api: &Api,
    search: &Search,
    who: &Principal,
    wanted: &Wanted,
    found: Found,
    mut meter: Meter,
    begun: Instant,
) -> Result<Reply, Error> {
    let Found { hits, query, ranked, corrected, complete_to, partial } = found;
    let cursor = |hit: &Hit| Cursor(Place::new(hit.key, ranked.as_ref(), corrected.as_deref()));
    let entries = hits.into_iter().map(|hit| Ok((cursor(&hit), hit)));
    let showing = Showing {
        api,
        search,
        who,
        query: &query,
        around: wanted.around,
        by_score: wanted.ask.order == Order::Relevance,
    };
    let make = |_: &Cursor, hit: Hit, meter: &mut Meter| showing.hit(hit, meter);
    let (hits, next) = wanted.page.fill(entries, &mut meter, make)?;
    let page = SearchPage {
        hits,
        next,
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
        complete_to: clock::rfc3339(complete_to),
        partial: partial.then_some(true),
        corrected,
    };
    Ok(charged(json(StatusCode::OK, &page), meter))
}

/// How hits are shown to a user.
struct Showing<'a> {
    api: &'a Api,
    search: &'a Search,
    who: &'a Principal,
    query: &'a crate::search::Query,
    around: usize,
    by_score: bool,
}

impl Showing<'_> {
    /// A hit, and about its bytes; nothing if the user may no longer read its thread.
    fn hit(&self, hit: Hit, meter: &mut Meter) -> Result<Option<(SearchHit, usize)>, Error> {
        let read = |_| Ok(self.with_neighbours(&hit.thread, hit.seq)?);
        let events = if_readable(self.api.rights.read(self.who, &hit.thread, read))?;
        let Some(events) = events else { return Ok(None) };
        let bytes: usize = events.iter().map(|event| event.frame.len()).sum();
        meter.add(bytes)?;

        let raw = |frame: &str| RawValue::from_string(without_type(frame)).ok();
        let Some(event) = events.iter().find(|event| event.seq == hit.seq) else { return Ok(None) };
        let Some(item) = raw(&event.frame) else { return Ok(None) };
        let neighbours = events.iter().filter(|event| event.seq != hit.seq);
        let neighbours = (self.around > 0).then(|| neighbours.filter_map(|event| raw(&event.frame)).collect());
        let shown = SearchHit {
            highlights: self.highlights(&event.frame),
            thread: hit.thread,
            seq: hit.seq,
            score: self.by_score.then(|| hit.key.shown_score()),
            event: item,
            around: neighbours,
        };
        Ok(Some((shown, bytes)))
    }

    /// An event with those around it, as far as they fit beside it: those right before it, and then those right after.
    fn with_neighbours(&self, thread: &str, seq: u64) -> Result<Vec<StoredEvent>, StoreError> {
        let read = |from: u64, to, bytes, newest_first| {
            let range = EventRange { from: from.max(1), to, limit: usize::MAX, bytes, newest_first };
            self.api.store.events(&self.who.tenant, thread, range)
        };
        let size = |events: &[StoredEvent]| events.iter().map(|event| event.frame.len()).sum::<usize>();
        let hit = read(seq, seq, PAGE_BYTES, false)?;
        if self.around == 0 {
            return Ok(hit);
        }
        let mut room = PAGE_BYTES.saturating_sub(size(&hit));
        let mut neighbours = |from, to, newest_first| {
            let found = read(from, to, room, newest_first)?;
            // The first of them is read however large it is.
            let left = room.checked_sub(size(&found));
            room = left.unwrap_or(0);
            Ok::<_, StoreError>(if left.is_some() { found } else { Vec::new() })
        };
        let around = self.around as u64;
        let mut events = neighbours(seq.saturating_sub(around), seq.saturating_sub(1), true)?;
        events.reverse();
        events.extend(hit);
        events.extend(neighbours(seq.saturating_add(1), seq.saturating_add(around), false)?);
        Ok(events)
    }

    /// The first texts of an event that have what was searched for.
    fn highlights(&self, frame: &str) -> Vec<Highlight> {
        let Some(frame) = StoredFrame::parse(frame) else { return Vec::new() };
        let pieces = document::pieces(&frame.kind, frame.data);
        let marked = pieces.iter().filter_map(|piece| {
            let ranges = self.search.ranges(self.query, piece);
            (!ranges.is_empty()).then(|| highlight(piece, &ranges))
        });
        marked.take(TEXTS).collect()
    }
}

/// A text, cut to what is around the first of these places.
fn highlight(piece: &Piece, ranges: &[Range<usize>]) -> Highlight {
    let text = &piece.text;
    let first = ranges.first().map_or(0, |range| range.start);
    let begin = match text.chars().nth(SHOWN) {
        None => 0,
        Some(_) => text[..first].char_indices().rev().nth(BEFORE).map_or(0, |(at, c)| at + c.len_utf8()),
    };
    let end = text[begin..].char_indices().nth(SHOWN).map_or(text.len(), |(at, _)| begin + at);
    let shown = &text[begin..end];

    let mut marked = String::with_capacity(shown.len() + 16);
    let (mut at, mut characters, mut places) = (begin, 0, Vec::new());
    for range in ranges.iter().take_while(|range| range.start < end) {
        let range = range.start..range.end.min(end);
        characters += text[at..range.start].chars().count();
        let length = text[range.clone()].chars().count();
        places.push((characters, characters + length));
        characters += length;
        escape(&text[at..range.start], &mut marked);
        marked.push_str("<mark>");
        escape(&text[range.clone()], &mut marked);
        marked.push_str("</mark>");
        at = range.end;
    }
    escape(&text[at..end], &mut marked);
    Highlight { field: piece.field.name(), text: shown.to_owned(), ranges: places, marked }
}

/// Text as HTML.
fn escape(text: &str, html: &mut String) {
    for c in text.chars() {
        match c {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#39;"),
            _ => html.push(c),
        }
    }
}

/// Where a page ended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Cursor(Place);

/// The same, as it stands in a cursor.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Place {
    /// Score, time, partition, offset, seq.
    key: (u32, u64, u32, u64, u64),
    /// At what time it was ranked, how many events there were, and how many had each term.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ranked: Option<(u64, u64, Vec<u64>)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    corrected: Option<String>,
}

impl Place {
    fn new(key: Key, ranked: Option<&Ranked>, corrected: Option<&str>) -> Place {
        let Key { score, at, partition, offset, seq } = key;
        let ranked = ranked.map(|it| (it.now, it.statistics.events, it.statistics.with_term.clone()));
        Place { key: (score, at, partition, offset, seq), ranked, corrected: corrected.map(str::to_owned) }
    }
}

impl From<Place> for After {
    fn from(place: Place) -> After {
        let (score, at, partition, offset, seq) = place.key;
        let ranked =
            place.ranked.map(|(now, events, with_term)| Ranked { statistics: Statistics { events, with_term }, now });
        After { key: Key { score, at, partition, offset, seq }, ranked, corrected: place.corrected }
    }
}

impl SortKey for Cursor {
    fn to_bytes(&self) -> Vec<u8> {
        crate::protocol::json::encode_bytes(&self.0)
    }

    fn from_bytes(bytes: &[u8]) -> Option<Cursor> {
        serde_json::from_slice(bytes).ok().map(Cursor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::document::Field;

    fn shown(text: &str, found: &[&str]) -> Highlight {
        let ranges: Vec<Range<usize>> = found
            .iter()
            .map(|word| {
                let start = text.find(word).expect("it is there");
                start..start + word.len()
            })
            .collect();
        highlight(&Piece { field: Field::Text, text: text.to_owned() }, &ranges)
    }

    #[test]
    fn what_was_found_is_marked_and_nothing_else_is_html() {
        let it = shown("Größe <b> & \"mehr\"", &["Größe", "mehr"]);
        assert_eq!(it.ranges, [(0, 5), (13, 17)]);
        assert_eq!(it.marked, "<mark>Größe</mark> &lt;b&gt; &amp; &quot;<mark>mehr</mark>&quot;");
        assert_eq!((it.field, &*it.text), ("text", "Größe <b> & \"mehr\""));
    }

    #[test]
    fn a_long_text_is_cut_around_what_was_found() {
        let text = format!("{}needle{}", "ä ".repeat(1_000), " ö".repeat(1_000));
        let it = shown(&text, &["needle"]);
        assert_eq!(it.text.chars().count(), SHOWN);
        let (from, to) = it.ranges[0];
        assert_eq!(it.text.chars().skip(from).take(to - from).collect::<String>(), "needle");
        assert!(it.marked.contains("<mark>needle</mark>"));
        let at_the_end = format!("{}needle", "a ".repeat(1_000));
        assert!(shown(&at_the_end, &["needle"]).text.ends_with("needle"));
    }

    #[test]
    fn a_cursor_comes_back_with_all_that_the_order_depends_on() {
        let key = Key { score: 7, at: 8, partition: 9, offset: 10, seq: 11 };
        let ranked = Ranked { statistics: Statistics { events: 5, with_term: vec![1, 2] }, now: 3 };
        let sent = Cursor(Place::new(key, Some(&ranked), Some("better")));
        let read = Cursor::from_bytes(&sent.to_bytes()).expect("our own");
        let after = After::from(read.0);
        assert_eq!((after.key, after.ranked, after.corrected.as_deref()), (key, Some(ranked), Some("better")));
        assert!(Cursor::from_bytes(b"7").is_none());
    }
}
