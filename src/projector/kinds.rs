//! Custom kinds with a schema: what a record about one makes of it. All records about kinds of one tenant are in one partition, so
//! that they have an order, and a tenant's kinds can be counted.
//!
//! Whether a schema is one is not asked here: the library that says so may say otherwise in its next version. Who sets one was
//! told (`ingest/kinds`), and events are checked before they are in the log.

use std::collections::HashMap;

use super::Published;
use super::transaction::Transaction;
use crate::clock;
use crate::log::{Foreign, Record};
use crate::protocol::custom::{KindRecord, MAX_KINDS, MAX_SCHEMA, check_kind};
use crate::protocol::error::{Code, Error};
use crate::protocol::kinds::{KIND_DELETED, KIND_SET};
use crate::protocol::{ids, json};
use crate::store::{KindRow, Store, StoreError};

/// What this batch has changed: by tenant and kind, and `None` for one whose schema was deleted.
#[derive(Default)]
pub(super) struct Kinds {
    rows: HashMap<(String, String), Option<KindRow>>,
}

/// A record about a kind, checked.
pub(super) struct KindAct {
    pub(super) id: uuid::Uuid,
    /// Its time, in milliseconds.
    pub(super) at: u64,
    tenant: String,
    kind: String,
    act: Act,
}

enum Act {
    Set { schema: String, by: String },
    Delete,
}

impl Kinds {
    /// Applies a record; says what became of it.
    pub(super) fn judge(
        &mut self,
        tx: &mut Transaction<'_>,
        record: KindAct,
    ) -> Result<Result<Published, Error>, StoreError> {
        let KindAct { id, at, tenant, kind, act } = record;
        let name = (tenant, kind);
        let row = self.row(tx.store, &name)?;
        let mut published = Published { seq: 0, event: id, duplicate: false };
        let changed = match act {
            Act::Set { schema, by } => {
                let digest = *blake3::hash(schema.as_bytes()).as_bytes();
                if row.as_ref().is_some_and(|row| row.digest == digest) {
                    published.duplicate = true;
                    return Ok(Ok(published));
                }
                if row.is_none() && self.count(tx.store, &name.0)? >= MAX_KINDS {
                    let why = format!("the tenant has {MAX_KINDS} kinds with a schema, and no more are possible");
                    return Ok(Err(Error::new(Code::TooLarge, why).at("kind")));
                }
                let row = KindRow { id: id.into_bytes(), by, at, bytes: schema.len() as u64, digest };
                tx.rows.put_kind(&name.0, &name.1, &row, schema);
                Some(row)
            }
            Act::Delete if row.is_none() => return Ok(Err(no_schema())),
            Act::Delete => {
                tx.rows.delete_kind(&name.0, &name.1);
                None
            }
        };
        self.rows.insert(name, changed);
        Ok(Ok(published))
    }

    fn row(&self, store: &Store, name: &(String, String)) -> Result<Option<KindRow>, StoreError> {
        match self.rows.get(name) {
            Some(row) => Ok(row.clone()),
            None => store.kind(&name.0, &name.1),
        }
    }

    /// How many kinds of the tenant have a schema.
    fn count(&self, store: &Store, tenant: &str) -> Result<usize, StoreError> {
        let mut count = self.rows.iter().filter(|((whose, _), row)| whose == tenant && row.is_some()).count();
        for stored in store.kinds(tenant) {
            let (kind, _) = stored?;
            count += usize::from(!self.rows.contains_key(&(tenant.to_owned(), kind)));
        }
        Ok(count)
    }
}

/// The answer when a kind has no schema.
fn no_schema() -> Error {
    Error::new(Code::NotFound, "this kind has no schema").at("kind")
}

/// What a record about kinds of this tenant says; or why it is foreign.
pub(super) fn read(tenant: &str, record: &Record) -> Result<KindAct, Foreign> {
    read_act(tenant, record).map_err(|why| Foreign::new(why, record))
}

fn read_act(tenant: &str, record: &Record) -> Result<KindAct, String> {
    let it: KindRecord = json::decode_bytes(&record.value)
        .map_err(|error| format!("the value is not about a kind: {}", error.message))?;
    if it.kind != record.kind {
        return Err("the value's kind is not the one that its header says".to_owned());
    }
    if it.tenant != tenant {
        return Err("its key is not that of its tenant's kinds".to_owned());
    }
    let names = check_kind(&it.name).and(ids::check_name("by", &it.by));
    names.map_err(|error| error.to_string())?;

    let act = match (&*it.kind, it.schema) {
        (KIND_SET, Some(schema)) => {
            let schema = schema.get();
            if schema.len() > MAX_SCHEMA || !schema.starts_with('{') {
                return Err(format!("schema is no object of at most {MAX_SCHEMA} bytes"));
            }
            Act::Set { schema: schema.to_owned(), by: it.by.into_owned() }
        }
        (KIND_DELETED, None) => Act::Delete,
        _ => return Err("its kind and its schema do not fit".to_owned()),
    };
    let at = clock::parse_rfc3339(&it.at).ok_or("at is not RFC 3339")?;
    Ok(KindAct { id: it.id, at, tenant: it.tenant.into_owned(), kind: it.name.into_owned(), act })
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::super::wanted::Wanted;
    use super::*;

    fn set(kind: &str, schema: &str) -> KindAct {
        act(kind, Act::Set { schema: schema.to_owned(), by: "root".to_owned() })
    }

    fn act(kind: &str, act: Act) -> KindAct {
        KindAct { id: clock::event_id(), at: 1_000, tenant: "acme".into(), kind: kind.into(), act }
    }

    /// Judges these in one batch; gives for each whether it changed something, or the code of its refusal.
    fn judge(store: &Store, acts: Vec<KindAct>) -> Vec<Result<bool, Code>> {
        let mut tx = Transaction::new(store, Wanted::default());
        let mut kinds = Kinds::default();
        let judged = acts.into_iter().map(|act| {
            let verdict = kinds.judge(&mut tx, act).expect("the store answers");
            verdict.map(|published| !published.duplicate).map_err(|error| error.code)
        });
        let judged = judged.collect();
        store.commit(tx.rows).expect("the store takes it");
        judged
    }

    #[test]
    fn a_schema_is_set_replaced_and_deleted_and_the_same_once_more_changes_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let first = set("x.a", "{}");
        let id = first.id.into_bytes();
        let made = vec![act("x.a", Act::Delete), first, set("x.a", "{}")];
        assert_eq!(judge(&store, made), [Err(Code::NotFound), Ok(true), Ok(false)]);
        assert_eq!(judge(&store, vec![set("x.a", "{}")]), [Ok(false)], "nor in the next batch");
        let row = store.kind("acme", "x.a").expect("it is read").expect("it is there");
        assert_eq!((row.id, row.bytes, &*row.by), (id, 2, "root"));

        assert_eq!(judge(&store, vec![set("x.a", r#"{"type":"string"}"#)]), [Ok(true)]);
        let row = store.kind("acme", "x.a").expect("it is read").expect("it is there");
        let schema = store.kind_schema("acme", "x.a").expect("it is read").expect("it is there");
        assert!(row.id != id && schema.id == row.id && schema.schema == r#"{"type":"string"}"#, "{row:?}");
        assert_eq!(store.kind("globex", "x.a").expect("it is read"), None, "another tenant's");

        assert_eq!(
            judge(&store, vec![act("x.a", Act::Delete), act("x.a", Act::Delete)]),
            [Ok(true), Err(Code::NotFound)]
        );
        let gone = (store.kind("acme", "x.a"), store.kind_schema("acme", "x.a"));
        assert!(matches!(gone, (Ok(None), Ok(None))), "{gone:?}");
    }

    #[test]
    fn so_many_kinds_of_a_tenant_have_a_schema_and_no_more_however_they_came() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let make = |n: usize| set(&format!("x.{n}"), "{}");
        assert!(judge(&store, (0..MAX_KINDS / 2).map(make).collect()).iter().all(Result::is_ok));
        let more: Vec<_> = (MAX_KINDS / 2..MAX_KINDS + 1).map(make).collect();
        assert_eq!(judge(&store, more).last(), Some(&Err(Code::TooLarge)));
        let replaced = vec![set("x.0", r#"{"type":"null"}"#), act("x.0", Act::Delete), make(MAX_KINDS), make(0)];
        assert_eq!(judge(&store, replaced), [Ok(true), Ok(true), Ok(true), Err(Code::TooLarge)]);
    }

    #[test]
    fn a_record_that_says_something_else_is_foreign() {
        let raw = |text: String| RawValue::from_string(text).expect("it is JSON");
        let of_size = |bytes: usize| raw(format!(r#"{{"title":"{}"}}"#, "t".repeat(bytes - r#"{"title":""}"#.len())));
        let (largest, too_large, list) = (of_size(MAX_SCHEMA), of_size(MAX_SCHEMA + 1), raw("[]".to_owned()));
        let record = KindRecord {
            kind: KIND_SET.into(),
            id: clock::event_id(),
            tenant: "acme".into(),
            name: "x.a".into(),
            schema: Some(&largest),
            by: "root".into(),
            at: "2027-01-15T08:00:00Z".into(),
        };
        let is_read = |record: KindRecord<'_>| read("acme", &Record::from(&record)).is_ok();
        assert!(is_read(record.clone()));
        for foreign in [
            KindRecord { name: "user_message".into(), ..record.clone() },
            KindRecord { name: "x.".into(), ..record.clone() },
            KindRecord { schema: None, ..record.clone() },
            KindRecord { schema: Some(&list), ..record.clone() },
            KindRecord { schema: Some(&too_large), ..record.clone() },
            KindRecord { kind: KIND_DELETED.into(), ..record.clone() },
            KindRecord { kind: "kind_other".into(), ..record.clone() },
            KindRecord { tenant: "globex".into(), ..record.clone() },
            KindRecord { by: "a b".into(), ..record.clone() },
            KindRecord { at: "noon".into(), ..record.clone() },
        ] {
            assert!(!is_read(foreign.clone()), "{foreign:?}");
        }
    }
}
