//! What is done about dead letters: requeued or discarded, one or all that match, or rehearsed.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream;
use uuid::Uuid;
use warp::http::StatusCode;

use super::Api;
use super::dead_letters::{find, id_of, read_fingerprint};
use super::meter::Meter;
use super::page::{COPIES, PAGE_BYTES, Page, SortKey};
use super::reply::{Reply, charged, json};
use super::request::Request;
use crate::auth::Principal;
use crate::clock;
use crate::edge::blocking;
use crate::projector::letter_acts::{check_discardable, check_open, effect_of, record};
use crate::projector::rehearsal::Rehearsal;
use crate::protocol::error::{Code, Error};
use crate::protocol::json;
use crate::protocol::kinds::{LETTER_DISCARDED, LETTER_REQUEUED};
use crate::protocol::letters::{ActBody, Effect, LetterFilter, LetterOutcome, LetterOutcomes, NoteBody};
use crate::store::dead_letters::{DeadLetterCursor, DeadLetterFilter, DeadLetterRow, Order};

const MAX_NOTE: usize = 1_000;
/// About what a letter takes beside its event or record, and its outcome.
const LETTER_BYTES: usize = 2 << 10;
/// Threads whose letters are acted on at a time; those of one thread go one after the other.
const THREADS_AT_ONCE: usize = 16;

/// Where acts on all that match go on, and when they began: what fails again meanwhile is not tried a second time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ActCursor {
    after: DeadLetterCursor,
    /// Milliseconds.
    began: u64,
}

impl SortKey for ActCursor {
    fn to_bytes(&self) -> Vec<u8> {
        [&self.began.to_be_bytes()[..], &SortKey::to_bytes(&self.after)].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<ActCursor> {
        let (began, after) = bytes.split_first_chunk::<8>()?;
        Some(ActCursor { began: u64::from_be_bytes(*began), after: SortKey::from_bytes(after)? })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Requeue,
    Discard,
}

impl What {
    fn kind(self) -> &'static str {
        match self {
            What::Requeue => LETTER_REQUEUED,
            What::Discard => LETTER_DISCARDED,
        }
    }

    fn effect(self, row: &DeadLetterRow) -> Result<Effect, Error> {
        match self {
            What::Requeue => effect_of(row),
            What::Discard => Ok(Effect::Discard),
        }
    }
}

/// A letter that something is to be done about.
struct Letter {
    id: Uuid,
    row: DeadLetterRow,
    /// It is known to be the tenant's.
    known: bool,
}

impl Letter {
    /// Those of a thread in its order, and without a thread each on its own.
    fn group(&self) -> String {
        self.row.thread.clone().unwrap_or_else(|| format!(" {}", self.id))
    }

    fn place(&self) -> (u64, DeadLetterCursor) {
        (self.row.seq.or(self.row.place).unwrap_or(0), self.cursor())
    }

    fn cursor(&self) -> DeadLetterCursor {
        DeadLetterCursor::of(*self.id.as_bytes(), &self.row)
    }

    fn bytes(&self) -> usize {
        self.row.event.as_ref().map_or(0, String::len)
    }

    /// About what it takes in memory, with its outcome.
    fn size(&self) -> usize {
        let source = self.row.source.as_ref().map_or(0, |source| source.bytes.len());
        self.bytes() + source + 2 * self.row.error.len() + LETTER_BYTES
    }

    fn outcome(&self, effect: Effect, seq: u64) -> LetterOutcome {
        LetterOutcome {
            id: self.id,
            reason: self.row.reason.clone(),
            thread: self.row.thread.clone(),
            effect,
            seq: Some(seq).filter(|seq| *seq > 0),
            code: None,
            message: None,
        }
    }

    fn refused(&self, error: &Error) -> LetterOutcome {
        let (code, message) = (Some(error.code), Some(error.message.to_string()));
        LetterOutcome { code, message, ..self.outcome(Effect::None, 0) }
    }

    /// What is asked for can be done, as far as this node knows.
    fn check(&self, api: &Api, who: &Principal, what: What) -> Result<Effect, Error> {
        match what {
            What::Requeue => check_open(&self.row, self.row.round)?,
            What::Discard => check_discardable(&self.row, self.row.round)?,
        }
        if !self.known {
            let why = "nobody can tell whose record it is, so no tenant can do anything about it";
            return Err(Error::new(Code::Forbidden, why).at("id"));
        }
        let effect = what.effect(&self.row)?;
        if effect == Effect::Deliver {
            self.check_reader(api, who)?;
        }
        if let (Effect::Work, Some(group)) = (effect, &self.row.name)
            && api.store.group(&who.tenant, group)?.is_none()
        {
            return Err(Error::new(Code::Conflict, format!("there is no group {group} any more")).at("id"));
        }
        Ok(effect)
    }

    /// Who read the thread as its member must be one still, or the event would wait for nobody.
    fn check_reader(&self, api: &Api, who: &Principal) -> Result<(), Error> {
        let (Some(user), Some(thread), Some("member")) = (&self.row.user, &self.row.thread, self.row.grant.as_deref())
        else {
            return Ok(());
        };
        if api.store.is_member(&who.tenant, thread, user)? {
            return Ok(());
        }
        let why = format!("{user} is no longer a member of the thread, so it cannot be delivered to that user");
        Err(Error::new(Code::Conflict, why).at("id"))
    }
}

/// `POST /v1/dead-letters/{id}/requeue`
pub async fn requeue(api: Arc<Api>, mut it: Request) -> Result<Reply, Error> {
    it.no_query()?;
    let body = api.body(&mut it).await?;
    let wanted: NoteBody = if body.text.trim().is_empty() { NoteBody::default() } else { json::decode(&body.text)? };
    act_on_one(api, it, What::Requeue, wanted).await
}

/// `DELETE /v1/dead-letters/{id}`
pub async fn discard(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    let note = it.query(&["note"])?.text("note").map(str::to_owned);
    act_on_one(api, it, What::Discard, NoteBody { note, rehearse: false }).await
}

async fn act_on_one(api: Arc<Api>, it: Request, what: What, wanted: NoteBody) -> Result<Reply, Error> {
    check_note(wanted.note.as_deref())?;
    let id = id_of(&it)?;
    let (row, known) = api.level.look(|| find(&api, &it.who, id)).await?;
    let letter = Letter { id, row, known };
    let meter = api.meter(&it.who, letter.bytes() * COPIES).await?;

    let outcome = if wanted.rehearse {
        let (api, who) = (api.clone(), it.who.clone());
        blocking(move || rehearse(&api, &who, &[letter], what)).await?.remove(0)
    } else {
        letter.check(&api, &it.who, what)?;
        api.admission.count_bytes(&it.who, letter.bytes())?;
        act(&api, &it.who, &letter, what, wanted.note.as_deref()).await?
    };
    Ok(charged(json_reply(&outcome), meter))
}

fn json_reply<T: serde::Serialize>(body: &T) -> Reply {
    json(StatusCode::OK, body)
}

fn check_note(note: Option<&str>) -> Result<(), Error> {
    if note.is_some_and(|note| note.chars().count() > MAX_NOTE) {
        return Err(Error::field("note", format!("note has at most {MAX_NOTE} characters")));
    }
    Ok(())
}

/// Has it done by a record, and waits for what becomes of it.
async fn act(
    api: &Api,
    who: &Principal,
    letter: &Letter,
    what: What,
    note: Option<&str>,
) -> Result<LetterOutcome, Error> {
    let effect = letter.check(api, who, what)?;
    let act = record(what.kind(), clock::event_id(), letter.id, &letter.row, (&who.tenant, &who.user), note);
    let published = api.submit.write(act.id, (&act).into()).await?;
    Ok(letter.outcome(effect, published.seq))
}

/// What would become of letters that are acted on in this order.
fn rehearse(api: &Api, who: &Principal, letters: &[Letter], what: What) -> Result<Vec<LetterOutcome>, Error> {
    let mut rehearsal = Rehearsal::new(&api.store);
    let outcome = |letter: &Letter| -> Result<LetterOutcome, Error> {
        let effect = match letter.check(api, who, what) {
            Ok(effect) => effect,
            Err(refused) => return Ok(letter.refused(&refused)),
        };
        let verdict = match effect {
            Effect::Append => rehearsal.append(&who.tenant, &letter.row)?,
            Effect::Deliver => rehearsal.deliver(&who.tenant, letter.id, &letter.row)?,
            Effect::Work => rehearsal.work(&who.tenant, letter.id, &letter.row)?,
            Effect::Discard | Effect::None => return Ok(letter.outcome(effect, 0)),
        };
        Ok(match verdict {
            Ok(published) => letter.outcome(effect, published.seq),
            Err(refused) => letter.refused(&refused),
        })
    };
    letters.iter().map(outcome).collect()
}

/// `POST /v1/dead-letters/requeue`
pub async fn requeue_all(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    act_on_all(api, it, What::Requeue).await
}

/// `POST /v1/dead-letters/discard`
pub async fn discard_all(api: Arc<Api>, it: Request) -> Result<Reply, Error> {
    act_on_all(api, it, What::Discard).await
}

/// A page of the letters that match, oldest first.
async fn act_on_all(api: Arc<Api>, mut it: Request, what: What) -> Result<Reply, Error> {
    let body = api.body(&mut it).await?;
    let wanted: ActBody = json::decode(&body.text)?;
    check_note(wanted.note.as_deref())?;
    let filter = read_filter(&wanted.filter)?;
    let filters = [what.kind(), &json::encode(&wanted.filter)];
    let query = it.query(&["cursor", "limit"])?;
    let page: Page<ActCursor> = Page::read(&query, &it.who, &api.epoch, "dead-letter-acts", &filters)?;
    drop(query);

    let mut meter = api.meter(&it.who, page.memory()).await?;
    let began = page.after.map_or_else(clock::now_ms, |cursor| cursor.began);
    let range = Matching { filter, began, after: page.after.map(|cursor| cursor.after), limit: page.limit };
    let (reading, who) = (api.clone(), it.who.clone());
    let (letters, last, meter) = blocking(move || {
        let (letters, last) = range.read(&reading, &who, &mut meter)?;
        Ok::<_, Error>((letters, last, meter))
    })
    .await?;
    let next = last.map(|after| page.seal(&ActCursor { after, began }));

    let outcomes = if wanted.rehearse {
        let (api, who) = (api.clone(), it.who.clone());
        let items = blocking(move || rehearse(&api, &who, &in_order(letters), what)).await?;
        outcomes(items, true, next, None)
    } else {
        let (admitted, retry) = admit(&api, &it.who, &letters)?;
        let next = match letters.get(..admitted).and_then(|admitted| admitted.last()) {
            Some(last) if admitted < letters.len() => Some(page.seal(&ActCursor { after: last.cursor(), began })),
            _ => next,
        };
        let mut letters = letters;
        letters.truncate(admitted);
        let items = act_in_order(&api, &it.who, letters, what, wanted.note.as_deref()).await;
        outcomes(items, false, next, retry)
    };
    Ok(charged(json_reply(&outcomes), meter))
}

fn read_filter(wanted: &LetterFilter) -> Result<DeadLetterFilter, Error> {
    let time = |name: &'static str, text: &Option<String>| {
        let read = |text: &String| {
            let why =
                || Error::field(format!("filter.{name}"), format!("filter.{name} must be RFC 3339, not {text:.60}"));
            clock::parse_rfc3339(text).ok_or_else(why)
        };
        text.as_ref().map(read).transpose()
    };
    let fingerprint = wanted.fingerprint.as_deref().map(read_fingerprint).transpose();
    Ok(DeadLetterFilter {
        reason: wanted.reason.clone(),
        fingerprint: fingerprint.map_err(|error| error.at("filter.fingerprint"))?,
        thread: wanted.thread.clone(),
        kind: wanted.kind.clone(),
        group: wanted.group.clone(),
        since: time("since", &wanted.since)?,
        until: time("until", &wanted.until)?,
    })
}

/// A page of the letters that match.
struct Matching {
    filter: DeadLetterFilter,
    began: u64,
    after: Option<DeadLetterCursor>,
    limit: usize,
}

impl Matching {
    /// The letters, and where the next page begins, if there is more.
    fn read(
        &self,
        api: &Api,
        who: &Principal,
        meter: &mut Meter,
    ) -> Result<(Vec<Letter>, Option<DeadLetterCursor>), Error> {
        let (mut letters, mut bytes) = (Vec::new(), 0);
        let tenants = [&*who.tenant, ""];
        let last =
            api.store.dead_letters(tenants, &self.filter, Order::OldestFirst, self.after, |key, row, known| {
                if row.acts.last().is_some_and(|act| act.at >= self.began) {
                    return Ok(ControlFlow::Continue(()));
                }
                let letter = Letter { id: Uuid::from_bytes(key.id), row, known };
                let size = letter.size();
                meter.add(size * COPIES)?;
                bytes += size;
                letters.push(letter);
                let is_full = letters.len() == self.limit || bytes >= PAGE_BYTES;
                Ok::<_, Error>(if is_full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })?;
        Ok((letters, last))
    }
}

/// How many of the letters the user's rate allows now, and when it allows more, if that is not all.
fn admit(api: &Api, who: &Principal, letters: &[Letter]) -> Result<(usize, Option<u64>), Error> {
    for (n, letter) in letters.iter().enumerate() {
        let admitted = api.admission.count_more(who, 1).and_then(|()| api.admission.count_bytes(who, letter.bytes()));
        match admitted {
            Ok(()) => {}
            Err(refused) if n == 0 => return Err(refused),
            Err(refused) => return Ok((n, refused.retry_after_ms)),
        }
    }
    Ok((letters.len(), None))
}

/// Letters by their threads, those of a thread in its order.
fn by_thread(letters: Vec<Letter>) -> BTreeMap<String, Vec<Letter>> {
    let mut groups: BTreeMap<String, Vec<Letter>> = BTreeMap::new();
    for letter in letters {
        groups.entry(letter.group()).or_default().push(letter);
    }
    groups.values_mut().for_each(|group| group.sort_by_key(Letter::place));
    groups
}

fn in_order(letters: Vec<Letter>) -> Vec<Letter> {
    by_thread(letters).into_values().flatten().collect()
}

/// Acts on letters: in each thread on one after the other, each after the verdict on the one before it.
async fn act_in_order(
    api: &Arc<Api>,
    who: &Principal,
    letters: Vec<Letter>,
    what: What,
    note: Option<&str>,
) -> Vec<LetterOutcome> {
    let threads = stream::iter(by_thread(letters).into_values().map(|group| async move {
        let mut outcomes = Vec::with_capacity(group.len());
        for letter in &group {
            let done = act(api, who, letter, what, note).await;
            outcomes.push(done.unwrap_or_else(|refused| letter.refused(&refused)));
        }
        outcomes
    }));
    let outcomes: Vec<_> = threads.buffered(THREADS_AT_ONCE).collect().await;
    outcomes.into_iter().flatten().collect()
}

fn outcomes(
    items: Vec<LetterOutcome>,
    rehearsed: bool,
    next: Option<String>,
    retry_after_ms: Option<u64>,
) -> LetterOutcomes {
    let refused = items.iter().filter(|it| it.effect == Effect::None).count();
    LetterOutcomes { rehearsed, done: items.len() - refused, refused, items, next, retry_after_ms }
}
