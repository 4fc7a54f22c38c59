//! Groups: what a record about one makes of it. All records about groups of one tenant are in one partition, so that two who
//! make a group make one, and a tenant's groups can be counted.
//!
//! A group that is deleted and made again has another id, by which its work is told from that of the one before
//! ([`super::work`]).

use std::collections::HashMap;

use super::transaction::Transaction;
use super::{Published, rules};
use crate::clock;
use crate::log::{Foreign, Record};
use crate::protocol::error::{Code, Error};
use crate::protocol::kinds::{GROUP_DELETED, GROUP_PAUSED, GROUP_RESUMED, GROUP_SET};
use crate::protocol::work::{
    Boost, GroupRecord, GroupSettings, MAX_GROUPS, Overflow, StartFrom, WorkOrder, check_group,
};
use crate::protocol::{ids, json};
use crate::store::{GroupRow, Store, StoreError};

/// What this batch has changed: by tenant and group, and `None` for one that was deleted.
#[derive(Default)]
pub(super) struct Groups {
    rows: HashMap<(String, String), Option<GroupRow>>,
}

/// A record about a group, checked.
pub(super) struct GroupAct {
    pub(super) id: uuid::Uuid,
    /// Its time, in milliseconds.
    pub(super) at: u64,
    tenant: String,
    group: String,
    act: Act,
}

enum Act {
    Set { settings: GroupSettings, if_absent: bool },
    Pause(bool),
    Delete,
}

impl Groups {
    /// Applies a record; says what became of it.
    pub(super) fn judge(
        &mut self,
        tx: &mut Transaction<'_>,
        record: GroupAct,
    ) -> Result<Result<Published, Error>, StoreError> {
        let GroupAct { id, at, tenant, group, act } = record;
        let name = (tenant, group);
        let row = self.row(tx.store, &name)?;
        let changed = match (act, &row) {
            (Act::Set { if_absent: true, .. }, Some(_)) => row.clone(),
            (Act::Set { settings, .. }, Some(row)) => Some(with_settings(row, &settings, id)),
            (Act::Set { settings, .. }, None) => {
                if self.count(tx.store, &name.0)? >= MAX_GROUPS {
                    let why = format!("the tenant has {MAX_GROUPS} groups, and no more are possible");
                    return Ok(Err(Error::new(Code::TooLarge, why).at("group")));
                }
                let from = if settings.from == StartFrom::Start { 0 } else { at };
                Some(with_settings(&new_row(id, at, from), &settings, id))
            }
            (Act::Pause(_) | Act::Delete, None) => return Ok(Err(no_group())),
            (Act::Pause(paused), Some(row)) => Some(GroupRow { paused, ..row.clone() }),
            (Act::Delete, Some(_)) => None,
        };

        let duplicate = changed == row;
        match &changed {
            Some(row) if !duplicate => tx.rows.put_group(&name.0, &name.1, row),
            Some(_) => {}
            None => tx.rows.delete_group(&name.0, &name.1),
        }
        if !duplicate {
            tx.wanted.set(&name.0, &name.1, changed.as_ref());
        }
        self.rows.insert(name, changed);
        Ok(Ok(Published { seq: 0, event: id, duplicate }))
    }

    fn row(&self, store: &Store, name: &(String, String)) -> Result<Option<GroupRow>, StoreError> {
        match self.rows.get(name) {
            Some(row) => Ok(row.clone()),
            None => store.group(&name.0, &name.1),
        }
    }

    /// How many groups the tenant has.
    fn count(&self, store: &Store, tenant: &str) -> Result<usize, StoreError> {
        let mut count = self.rows.iter().filter(|((whose, _), row)| whose == tenant && row.is_some()).count();
        for stored in store.groups(tenant) {
            let (group, _) = stored?;
            count += usize::from(!self.rows.contains_key(&(tenant.to_owned(), group)));
        }
        Ok(count)
    }
}

/// The answer when there is no such group.
fn no_group() -> Error {
    Error::new(Code::NotFound, "there is no such group").at("group")
}

fn new_row(id: uuid::Uuid, at: u64, from: u64) -> GroupRow {
    GroupRow {
        id: id.into_bytes(),
        created_at: at,
        kinds: Vec::new(),
        from,
        lease_ms: 0,
        attempts: 0,
        backoff_min_ms: 0,
        backoff_max_ms: 0,
        limit: 0,
        overflow: Overflow::Accept,
        order: WorkOrder::Thread,
        boost: Boost::default(),
        paused: false,
        revision: id.into_bytes(),
    }
}

/// The group with these settings, by the record with this id. Where it began stays.
fn with_settings(row: &GroupRow, settings: &GroupSettings, id: uuid::Uuid) -> GroupRow {
    let mut kinds = settings.kinds.clone();
    kinds.sort_unstable();
    kinds.dedup();
    GroupRow {
        revision: if kinds == row.kinds { row.revision } else { id.into_bytes() },
        kinds,
        lease_ms: settings.lease_ms,
        attempts: settings.attempts,
        backoff_min_ms: settings.backoff.min_ms,
        backoff_max_ms: settings.backoff.max_ms,
        limit: settings.limit,
        overflow: settings.overflow,
        order: settings.order,
        boost: settings.boost,
        ..row.clone()
    }
}

/// What a record about groups of this tenant says; or why it is foreign.
pub(super) fn read(tenant: &str, record: &Record) -> Result<GroupAct, Foreign> {
    read_act(tenant, record).map_err(|why| Foreign::new(why, record))
}

fn read_act(tenant: &str, record: &Record) -> Result<GroupAct, String> {
    let it: GroupRecord = json::decode_bytes(&record.value)
        .map_err(|error| format!("the value is not about a group: {}", error.message))?;
    if it.kind != record.kind {
        return Err("the value's kind is not the one that its header says".to_owned());
    }
    if it.tenant != tenant {
        return Err("its key is not that of its tenant's groups".to_owned());
    }
    let names = check_group(&it.group).and(ids::check_name("by", &it.by));
    names.map_err(|error| error.to_string())?;

    let act = match (it.kind.as_str(), it.settings) {
        (GROUP_SET, Some(settings)) => {
            settings.check().map_err(|error| error.to_string())?;
            let GroupSettings { limit, overflow, order, .. } = GroupSettings::default();
            let is_older = (settings.limit, settings.overflow, settings.order) == (limit, overflow, order);
            if record.rules < rules::WORK_OVERFLOWS && !is_older {
                return Err("limit, overflow and order are of version 5 of the rules".to_owned());
            }
            if record.rules < rules::GROUPS_HAVE_BOOSTS && settings.boost != Boost::default() {
                return Err("boost is of version 6 of the rules".to_owned());
            }
            Act::Set { settings, if_absent: it.if_absent }
        }
        (GROUP_PAUSED, None) => Act::Pause(true),
        (GROUP_RESUMED, None) => Act::Pause(false),
        (GROUP_DELETED, None) => Act::Delete,
        _ => return Err("its kind and its settings do not fit".to_owned()),
    };
    let at = clock::parse_rfc3339(&it.at).ok_or("at is not RFC 3339")?;
    Ok(GroupAct { id: it.id, at, tenant: it.tenant, group: it.group, act })
}

#[cfg(test)]
mod tests {
    use super::super::wanted::Wanted;
    use super::*;

    fn act(group: &str, act: Act) -> GroupAct {
        GroupAct { id: clock::event_id(), at: 1_000, tenant: "acme".into(), group: group.into(), act }
    }

    fn set(settings: &str, if_absent: bool) -> Act {
        Act::Set { settings: serde_json::from_str(settings).expect("settings"), if_absent }
    }

    /// Judges these in one batch; gives for each whether it changed something, or the code of its refusal.
    fn judge(store: &Store, acts: Vec<GroupAct>) -> Vec<Result<bool, Code>> {
        let mut tx = Transaction::new(store, Wanted::default());
        let mut groups = Groups::default();
        let judged = acts.into_iter().map(|act| {
            let verdict = groups.judge(&mut tx, act).expect("the store answers");
            verdict.map(|published| !published.duplicate).map_err(|error| error.code)
        });
        let judged = judged.collect();
        store.commit(tx.rows).expect("the store takes it");
        judged
    }

    #[test]
    fn settings_of_a_later_version_of_the_rules_make_a_record_of_an_earlier_one_foreign() {
        let is_read = |version, settings: &str| {
            let record = GroupRecord {
                kind: GROUP_SET.to_owned(),
                id: clock::event_id(),
                tenant: "acme".to_owned(),
                group: "g".to_owned(),
                settings: Some(serde_json::from_str(settings).expect("settings")),
                if_absent: false,
                by: "root".to_owned(),
                at: "2027-01-15T08:00:00Z".to_owned(),
            };
            read("acme", &Record { rules: version, ..Record::from(&record) }).is_ok()
        };
        let (order, boost) = (r#"{"order":"none"}"#, r#"{"boost":{"high_ms":1,"low_ms":0}}"#);
        assert!(is_read(4, "{}") && !is_read(4, order) && is_read(5, order));
        assert!(!is_read(5, boost) && is_read(6, boost));
    }

    #[test]
    fn a_group_is_made_once_changed_paused_and_deleted() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let made =
            vec![act("g", Act::Pause(true)), act("g", set("{}", true)), act("g", set(r#"{"attempts":2}"#, true))];
        assert_eq!(judge(&store, made), [Err(Code::NotFound), Ok(true), Ok(false)]);
        let row = store.group("acme", "g").expect("it is read").expect("it is there");
        assert_eq!((row.attempts, row.from, row.paused), (5, 1_000, false));

        let changes = vec![
            act("g", set(r#"{"attempts":2,"from":"start","kinds":["x.b","x.a","x.b"]}"#, false)),
            act("g", Act::Pause(true)),
            act("g", Act::Pause(true)),
        ];
        assert_eq!(judge(&store, changes), [Ok(true), Ok(true), Ok(false)]);
        let changed = store.group("acme", "g").expect("it is read").expect("it is there");
        assert_eq!((changed.id, changed.from), (row.id, 1_000), "where it began stays");
        assert_eq!(
            (changed.attempts, changed.paused, &changed.kinds[..]),
            (2, true, &["x.a".into(), "x.b".into()][..])
        );

        let again = vec![act("g", Act::Delete), act("g", Act::Delete), act("g", set(r#"{"from":"start"}"#, false))];
        assert_eq!(judge(&store, again), [Ok(true), Err(Code::NotFound), Ok(true)]);
        let other = store.group("acme", "g").expect("it is read").expect("it is there");
        assert!(other.id != row.id && other.from == 0, "{other:?}");
    }

    #[test]
    fn a_tenant_has_so_many_groups_and_no_more_however_they_came() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(folder.path()).expect("it opens");
        let make = |n: usize| act(&format!("g{n}"), set("{}", false));
        assert!(judge(&store, (0..MAX_GROUPS / 2).map(make).collect()).iter().all(Result::is_ok));
        let more: Vec<_> = (MAX_GROUPS / 2..MAX_GROUPS + 1).map(make).collect();
        assert_eq!(judge(&store, more).last(), Some(&Err(Code::TooLarge)));
        let freed = vec![act("g0", Act::Delete), make(MAX_GROUPS), make(MAX_GROUPS + 1)];
        assert_eq!(judge(&store, freed), [Ok(true), Ok(true), Err(Code::TooLarge)]);
    }
}
