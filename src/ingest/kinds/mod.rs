//! Custom kinds with a schema: whether data may become an event of its kind.
//!
//! Which schema counts, the store says: the newest one that this node has projected. Schemas that are ready to check data are kept
//! ([`Kinds`]), the ones used last, and no more than fit; one that is not kept is made ready again by who needs it.

mod cost;
mod pattern;
mod schema;
mod words;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use serde_json::value::RawValue;
use tokio::runtime::{Handle, RuntimeFlavor};

pub use self::schema::Schema;
use crate::protocol::error::{Code, Error};
use crate::store::{KindSchemaRow, Store, keys};

/// What all schemas that are kept may take in memory, in bytes.
const KEPT: usize = 32 << 20;
/// What one takes that cannot be used.
const UNUSABLE: usize = 1 << 10;

/// A schema that is set.
struct Ready {
    /// The id of the record that set it.
    id: [u8; 16],
    bytes: usize,
    /// None if it cannot be used: it was set by another version of Weft, or into the log by another program.
    schema: Option<Schema>,
}

impl Ready {
    fn new(kind: &str, row: &KindSchemaRow) -> Ready {
        let made = off_the_worker(|| Schema::of_log(&row.schema));
        let made = made.inspect_err(|error| tracing::error!(kind, %error, "the schema of a kind cannot be used"));
        let schema = made.ok();
        Ready { id: row.id, bytes: schema.as_ref().map_or(UNUSABLE, Schema::bytes), schema }
    }

    fn check(&self, data: &RawValue) -> Result<(), Error> {
        match &self.schema {
            Some(schema) => schema.check(data),
            None => {
                let why = "the schema of this kind cannot be used by this node: set another, or delete it";
                Err(Error::new(Code::Unavailable, why).at("kind"))
            }
        }
    }
}

/// The schemas that are kept, by tenant and kind.
struct Cache {
    kept: LruCache<Vec<u8>, Arc<Ready>>,
    bytes: usize,
}

impl Cache {
    fn get(&mut self, key: &Vec<u8>, id: &[u8; 16]) -> Option<Arc<Ready>> {
        self.kept.get(key).filter(|ready| ready.id == *id).cloned()
    }

    /// Keeps a schema, in the place of one of before; whoever was first with this one, its own.
    fn add(&mut self, key: Vec<u8>, ready: Ready) -> Arc<Ready> {
        if let Some(ready) = self.get(&key, &ready.id) {
            return ready;
        }
        let ready = Arc::new(ready);
        self.bytes += ready.bytes;
        if let Some((_, before)) = self.kept.push(key, ready.clone()) {
            self.bytes -= before.bytes;
        }
        while self.bytes > KEPT
            && let Some((_, oldest)) = self.kept.pop_lru()
        {
            self.bytes -= oldest.bytes;
        }
        ready
    }
}

/// What data of custom kinds is held to.
pub struct Kinds {
    store: Arc<Store>,
    cache: Mutex<Cache>,
}

impl Kinds {
    pub fn new(store: Arc<Store>) -> Kinds {
        Kinds { store, cache: Mutex::new(Cache { kept: LruCache::unbounded(), bytes: 0 }) }
    }

    /// Refuses data of a custom kind that breaks its schema. Where the kind has none this is one look into the store.
    pub fn check(&self, tenant: &str, kind: &str, data: &RawValue) -> Result<(), Error> {
        let Some(row) = self.store.kind(tenant, kind)? else { return Ok(()) };
        let key = keys::in_tenant(tenant, kind);
        let kept = self.cache().get(&key, &row.id);
        let ready = match kept {
            Some(ready) => ready,
            // By now it may be gone, or another one: then that is what counts.
            None => match self.store.kind_schema(tenant, kind)? {
                Some(row) => {
                    let ready = Ready::new(kind, &row);
                    self.cache().add(key, ready)
                }
                None => return Ok(()),
            },
        };
        ready.check(data)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        // No section below can panic half way through a change.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what takes milliseconds, while another thread serves the sockets of this one.
fn off_the_worker<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::KindRow;

    fn put(store: &Store, tenant: &str, kind: &str, id: u8, schema: &str) {
        let mut rows = store.batch();
        let row = KindRow { id: [id; 16], by: "root".into(), at: 0, bytes: schema.len() as u64, digest: [id; 32] };
        rows.put_kind(tenant, kind, &row, schema.to_owned());
        store.commit(rows).expect("the store takes it");
    }

    fn new() -> (tempfile::TempDir, Arc<Store>, Kinds) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Arc::new(Store::open(folder.path()).expect("it opens"));
        (folder, store.clone(), Kinds::new(store))
    }

    fn check(kinds: &Kinds, tenant: &str, kind: &str, data: &str) -> Result<(), Code> {
        kinds.check(tenant, kind, serde_json::from_str(data).expect("JSON")).map_err(|error| error.code)
    }

    #[test]
    fn the_newest_schema_of_the_tenant_s_kind_counts_and_none_once_it_is_deleted() {
        let (_folder, store, kinds) = new();
        assert_eq!(check(&kinds, "acme", "x.a", "1"), Ok(()));
        put(&store, "acme", "x.a", 1, r#"{"type":"string"}"#);
        for _ in 0..2 {
            assert_eq!(check(&kinds, "acme", "x.a", "1"), Err(Code::BadRequest));
            assert_eq!(check(&kinds, "acme", "x.a", r#""a""#), Ok(()));
        }
        assert_eq!(check(&kinds, "globex", "x.a", "1"), Ok(()), "another tenant");
        assert_eq!(check(&kinds, "acme", "x.b", "1"), Ok(()), "another kind");
        put(&store, "acme", "x.a", 2, r#"{"type":"number"}"#);
        assert_eq!(check(&kinds, "acme", "x.a", "1"), Ok(()));
        assert_eq!(check(&kinds, "acme", "x.a", r#""a""#), Err(Code::BadRequest));

        let mut rows = store.batch();
        rows.delete_kind("acme", "x.a");
        store.commit(rows).expect("the store takes it");
        assert_eq!(check(&kinds, "acme", "x.a", r#""a""#), Ok(()));
    }

    #[test]
    fn a_schema_that_this_node_cannot_use_lets_nothing_through() {
        let (_folder, store, kinds) = new();
        put(&store, "acme", "x.a", 1, r#"{"unevaluatedItems":false}"#);
        assert_eq!(check(&kinds, "acme", "x.a", "1"), Err(Code::Unavailable));
    }

    #[test]
    fn no_more_is_kept_than_fits_and_what_is_not_kept_counts_all_the_same() {
        let (_folder, store, kinds) = new();
        let schema = format!(r#"{{"type":"string","title":"{}"}}"#, "t".repeat(60_000));
        let one = Schema::compile(&schema).expect("it is one").bytes();
        let fit = KEPT / one;
        for n in 0..fit + 3 {
            put(&store, "acme", &format!("x.{n}"), 1, &schema);
        }
        for _ in 0..2 {
            for n in 0..fit + 3 {
                assert_eq!(check(&kinds, "acme", &format!("x.{n}"), "1"), Err(Code::BadRequest), "{n}");
                let cache = kinds.cache();
                assert!(cache.bytes == cache.kept.len() * one && cache.bytes <= KEPT, "{}", cache.bytes);
            }
        }
        put(&store, "acme", "x.0", 2, &schema);
        assert_eq!(check(&kinds, "acme", "x.0", "1"), Err(Code::BadRequest));
        let cache = kinds.cache();
        assert_eq!(cache.bytes, cache.kept.len() * one, "the one of before is not counted any more");
    }
}
