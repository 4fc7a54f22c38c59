//! Dead letters over HTTP: what a list, a letter on its own and the counts of them are, and what is said and answered when
//! somebody does something about them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

/// A dead letter. What does not apply to its reason is absent.
#[derive(Serialize, JsonSchema)]
pub struct DeadLetterItem {
    pub id: Uuid,
    /// `unacknowledged`: sent with `confirm` and never acknowledged; `unreadable`: a foreign record in the log, or one that
    /// the projector failed at; `run_order`: an event that its run did not allow; `schema`: one that is not what its kind has
    /// to be; `attempts`, `rejected`, `overflow`: work of a queue.
    pub reason: String,
    /// When it failed, the last time. RFC 3339.
    pub at: String,
    /// How often it was tried.
    pub attempts: u32,
    pub error: String,
    /// The same for all that are alike: of reason, kind and the error's text without its numbers and ids. 16 hex digits.
    pub fingerprint: String,
    pub state: LetterStateName,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread: Option<String>,
    /// The event's kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The durable subscription, or the group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// The event.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Value>")]
    pub event: Option<Box<RawValue>>,
    /// The newest 20 attempts, oldest first, as far as they are known one by one.
    pub tries: Vec<LetterTry>,
    /// The newest 20 things that were done about it, oldest first.
    pub acts: Vec<LetterAct>,
    #[serde(flatten)]
    pub source: Option<UnreadableSource>,
    /// Of a letter that is asked for by its id: the events around it in its thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neighbours: Option<Neighbours>,
}

/// Whether somebody has to see to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LetterStateName {
    Open,
    /// It is to be tried again, and nobody has yet.
    Requeued,
    /// It was tried again, with success.
    Done,
    Discarded,
}

/// One attempt.
#[derive(Serialize, JsonSchema)]
pub struct LetterTry {
    /// RFC 3339.
    pub at: String,
    /// Who tried: the user who published or was sent it, or the worker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    pub reason: String,
}

/// What somebody did about a dead letter.
#[derive(Serialize, JsonSchema)]
pub struct LetterAct {
    pub act: ActName,
    /// The user who did it.
    pub by: String,
    /// RFC 3339.
    pub at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActName {
    Requeued,
    Discarded,
}

/// Where a record stands that cannot be read, and what it is.
#[derive(Serialize, JsonSchema)]
pub struct UnreadableSource {
    pub topic: String,
    pub partition: u32,
    pub offset: u64,
    /// The record's length.
    pub size: u64,
    /// Its first 64 KiB, in base64. Left out when nobody can tell whose it is: it might be another tenant's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<String>,
}

/// A page of dead letters.
#[derive(Serialize, JsonSchema)]
pub struct DeadLetterList {
    pub items: Vec<DeadLetterItem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// The events around a dead letter: next to its own seq, or to the thread's head when it was refused.
#[derive(Serialize, JsonSchema)]
pub struct Neighbours {
    /// Up to 5, in order.
    #[schemars(with = "Vec<serde_json::Value>")]
    pub before: Vec<Box<RawValue>>,
    /// Up to 5, in order.
    #[schemars(with = "Vec<serde_json::Value>")]
    pub after: Vec<Box<RawValue>>,
}

/// How many dead letters are open.
#[derive(Serialize, JsonSchema)]
pub struct DeadLetterCounts {
    pub total: u64,
    /// Those that there are, the most frequent first.
    pub reasons: Vec<ReasonCount>,
    /// The most frequent first.
    pub fingerprints: Vec<FingerprintCount>,
    /// Not all fingerprints are here: there are more than were asked for or looked at.
    pub truncated: bool,
}

#[derive(Serialize, JsonSchema)]
pub struct ReasonCount {
    pub reason: String,
    pub count: u64,
}

#[derive(Serialize, JsonSchema)]
pub struct FingerprintCount {
    pub fingerprint: String,
    pub reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// What they have in common, `#` in the place of numbers and ids.
    pub error: String,
    pub count: u64,
    /// When the first and the last of them failed. RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub newest: Option<String>,
}

/// The body of `POST /v1/dead-letters/{id}/requeue`; an empty one is none of it.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoteBody {
    /// Why, for those who read the letter later; up to 1,000 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1_000))]
    pub note: Option<String>,
    /// Only say what it would do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rehearse: bool,
}

/// The body of `POST /v1/dead-letters/requeue` and `/discard`.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ActBody {
    /// Those that match all of it; an empty one is all there are.
    pub filter: LetterFilter,
    /// Why, for those who read the letters later; up to 1,000 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1_000))]
    pub note: Option<String>,
    /// Only say what it would do.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rehearse: bool,
}

/// Which dead letters.
#[derive(Debug, Default, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LetterFilter {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// Work of this group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Those that failed then or later. RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Those that failed before. RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
}

/// What becomes of a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Its event is appended to its thread.
    Append,
    /// Its event is delivered again to the subscription that did not acknowledge it.
    Deliver,
    /// It is work of its group again.
    Work,
    /// It is in no list any more.
    Discard,
    /// Nothing: `code` and `message` say why.
    None,
}

/// What became of one letter, or would become of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct LetterOutcome {
    pub id: Uuid,
    pub reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread: Option<String>,
    pub effect: Effect,
    /// Of an event that was appended, or is delivered again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub code: Option<super::error::Code>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What became of a page of letters.
#[derive(Serialize, JsonSchema)]
pub struct LetterOutcomes {
    /// Nothing was done: this is what would be.
    pub rehearsed: bool,
    /// How many of these something became of.
    pub done: usize,
    /// How many of these nothing became of.
    pub refused: usize,
    /// The oldest first, those of a thread in its order.
    pub items: Vec<LetterOutcome>,
    /// Where to go on, if there are more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// When to go on, if the user's rate does not allow it at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}
