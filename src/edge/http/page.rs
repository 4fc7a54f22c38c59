//! One page of a list: where it begins, how long it is, and the cursor of the next one.
//!
//! A list is sorted by a key. A cursor is the key of the last entry that was sent, with a tag that binds it to the list, its
//! user, its filters and the log's epoch: a cursor of another list, from before the log was rolled back, or one that somebody
//! made up, is refused.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use super::meter::Meter;
use super::request::Query;
use crate::auth::Principal;
use crate::edge::cursor;
use crate::protocol::error::{Code, Error};

/// A page ends once it has so many bytes.
pub const PAGE_BYTES: usize = 4 << 20;
/// About the largest event, but for those that close a message written in deltas.
pub const EVENT_BYTES: usize = 66 << 10;
/// How often a page is in memory while it is made: as items, and as JSON, which grows by doubling.
pub const COPIES: usize = 3;

/// What a list is sorted by, ascending, as it stands in a cursor.
pub trait SortKey: Ord + Sized {
    fn to_bytes(&self) -> Vec<u8>;
    /// `None` if the bytes are no key of this list.
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

impl SortKey for u64 {
    fn to_bytes(&self) -> Vec<u8> {
        self.to_be_bytes().to_vec()
    }

    fn from_bytes(bytes: &[u8]) -> Option<u64> {
        Some(u64::from_be_bytes(bytes.try_into().ok()?))
    }
}

/// Highest first.
impl<K: SortKey> SortKey for Reverse<K> {
    fn to_bytes(&self) -> Vec<u8> {
        self.0.to_bytes()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Reverse<K>> {
        K::from_bytes(bytes).map(Reverse)
    }
}

/// Sorted as the bytes are.
impl SortKey for Vec<u8> {
    fn to_bytes(&self) -> Vec<u8> {
        self.clone()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Vec<u8>> {
        Some(bytes.to_vec())
    }
}

/// The page that a request asks for.
pub struct Page<K> {
    /// The key of tags: everything that makes the list what it is.
    list: [u8; 32],
    /// The last entry of the page before.
    pub after: Option<K>,
    pub limit: usize,
}

impl<K: SortKey> Page<K> {
    /// Reads `cursor` and `limit`. `list` is the list's name, `filters` what narrows it; `epoch` is the log's that it is made
    /// from, or empty if it is of this node alone.
    pub fn read(
        query: &Query<'_>,
        who: &Principal,
        epoch: &str,
        list: &str,
        filters: &[&str],
    ) -> Result<Page<K>, Error> {
        let mut hasher = blake3::Hasher::new_derive_key("weft 2026-11 cursor of a list");
        for part in [list, &*who.key, epoch].iter().chain(filters) {
            hasher.update(&(part.len() as u64).to_be_bytes()).update(part.as_bytes());
        }
        let mut page = Page { list: *hasher.finalize().as_bytes(), after: None, limit: query.limit()? };
        page.after = query.text("cursor").map(|cursor| page.open(cursor)).transpose()?;
        Ok(page)
    }

    /// This page of entries that come in any order, and one more if there is one. Holds no more than these at a time.
    pub fn select<T, E>(&self, entries: impl Iterator<Item = Result<(K, T), E>>) -> Result<Vec<(K, T)>, E> {
        let mut first = BTreeMap::new();
        for entry in entries {
            let (key, value) = entry?;
            if self.after.as_ref().is_none_or(|after| key > *after) {
                first.insert(key, value);
                if first.len() > self.limit + 1 {
                    first.pop_last();
                }
            }
        }
        Ok(first.into_iter().collect())
    }

    /// Makes the items of the page from entries in its order, until it is full: of entries, or of bytes. `make` gives an item
    /// and its bytes, or none for an entry that is left out. Gives the cursor of the next page as well, if there is more.
    pub fn fill<T, I>(
        &self,
        entries: impl IntoIterator<Item = Result<(K, T), Error>>,
        meter: &mut Meter,
        mut make: impl FnMut(&K, T, &mut Meter) -> Result<Option<(I, usize)>, Error>,
    ) -> Result<(Vec<I>, Option<String>), Error> {
        let (mut items, mut bytes, mut last) = (Vec::new(), 0, None);
        for (taken, entry) in entries.into_iter().enumerate() {
            let (key, value) = entry?;
            let is_full = taken == self.limit || bytes >= PAGE_BYTES;
            if is_full && let Some(last) = &last {
                return Ok((items, Some(self.seal(last))));
            }
            if let Some((item, size)) = make(&key, value, meter)? {
                meter.add(size * COPIES)?;
                bytes += size;
                items.push(item);
            }
            last = Some(key);
        }
        Ok((items, None))
    }

    /// What a page may hold in memory while it is made, if an item of it is one event.
    pub fn memory(&self) -> usize {
        (self.limit * EVENT_BYTES).min(PAGE_BYTES) * COPIES
    }

    /// The cursor of what comes after this key.
    pub fn seal(&self, last: &K) -> String {
        cursor::seal(&self.list, &last.to_bytes())
    }

    fn open(&self, cursor: &str) -> Result<K, Error> {
        let key = cursor::open(&self.list, cursor).and_then(|key| K::from_bytes(&key));
        key.ok_or_else(|| {
            Error::new(Code::CursorInvalid, "the cursor is not of this list, or from before the log was rolled back")
                .at("cursor")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Scopes;
    use crate::edge::http::request;
    use crate::memory::Pool;

    fn page<K: SortKey>(raw: &str, user: &str, list: &str, filters: &[&str]) -> Result<Page<K>, Error> {
        page_of("epoch", raw, user, list, filters)
    }

    fn page_of<K: SortKey>(epoch: &str, raw: &str, user: &str, list: &str, filters: &[&str]) -> Result<Page<K>, Error> {
        let who = Principal::new("acme", user, Scopes::default(), 1);
        Page::read(&request::query(raw, &["cursor", "limit"])?, &who, epoch, list, filters)
    }

    fn numbers<K: SortKey>(of: impl Fn(u64) -> K) -> Vec<(K, u64)> {
        [3, 1, 5, 2, 4].map(|n| (of(n), n)).into()
    }

    async fn meter() -> Meter {
        Meter::begin(&Pool::new(96 << 20), &"acme/ada".into(), 1).await.expect("there is room")
    }

    /// The page, and the next one's cursor; each number counts for so many bytes.
    async fn cut<K: SortKey>(raw: &str, of: impl Fn(u64) -> K, size: usize) -> (Vec<u64>, Option<String>) {
        let page = page(raw, "ada", "l", &[]).expect("our own cursor");
        let selected = page.select(numbers(of).into_iter().map(Ok::<_, Error>)).expect("no error");
        let make = |_: &K, n, _: &mut Meter| Ok(Some((n, size)));
        page.fill(selected.into_iter().map(Ok), &mut meter().await, make).expect("there is room")
    }

    /// All pages of a list of five.
    async fn pages<K: SortKey>(limit: usize, of: impl Fn(u64) -> K + Copy, size: usize) -> Vec<Vec<u64>> {
        let (mut raw, mut pages) = (format!("limit={limit}"), Vec::new());
        loop {
            let (entries, next) = cut(&raw, of, size).await;
            pages.push(entries);
            match next {
                Some(cursor) => raw = format!("limit={limit}&cursor={cursor}"),
                None => return pages,
            }
        }
    }

    #[tokio::test]
    async fn cursors_lead_through_a_list_once() {
        assert_eq!(pages(2, |n| n, 1).await, [vec![1, 2], vec![3, 4], vec![5]]);
        assert_eq!(pages(2, Reverse, 1).await, [vec![5, 4], vec![3, 2], vec![1]]);
        assert_eq!(pages(2, |n| vec![b'k', n as u8], 1).await, [vec![1, 2], vec![3, 4], vec![5]]);
    }

    #[tokio::test]
    async fn a_page_ends_when_it_has_its_bytes_and_holds_one_entry_at_least() {
        assert_eq!(pages(1_000, |n| n, PAGE_BYTES / 2).await, [vec![1, 2], vec![3, 4], vec![5]]);
        assert_eq!(pages(1_000, |n| n, PAGE_BYTES + 1).await, [[1], [2], [3], [4], [5]]);
    }

    #[tokio::test]
    async fn a_page_that_holds_all_has_no_next() {
        assert_eq!(cut("limit=5", |n| n, 1).await, (vec![1, 2, 3, 4, 5], None));
    }

    #[test]
    fn a_cursor_is_good_for_its_list_its_user_its_filters_and_its_epoch_alone() {
        let cursor = page::<u64>("", "ada", "l", &["f"]).expect("no cursor").seal(&7);
        let raw = format!("cursor={cursor}");
        assert_eq!(page::<u64>(&raw, "ada", "l", &["f"]).expect("its own").after, Some(7));
        let others = [("eve", "l", vec!["f"]), ("ada", "m", vec!["f"]), ("ada", "l", vec!["g"]), ("ada", "l", vec![])];
        for (user, list, filters) in others {
            let refused = page::<u64>(&raw, user, list, &filters).err().expect("another's");
            assert_eq!((refused.code, refused.field.as_deref()), (Code::CursorInvalid, Some("cursor")));
        }
        let before = page_of::<u64>("epoch.2-x", &raw, "ada", "l", &["f"]).err().expect("of another epoch");
        assert_eq!((before.code, before.field.as_deref()), (Code::CursorInvalid, Some("cursor")));
        for made_up in ["", "AAAA", "!", &format!("{cursor}AAAA"), &cursor[1..]] {
            assert!(page::<u64>(&format!("cursor={made_up}"), "ada", "l", &["f"]).is_err(), "{made_up}");
        }
    }
}
