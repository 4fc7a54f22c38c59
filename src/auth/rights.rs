//! What a user may do in a thread now: looked up in the store.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::Principal;
use super::scopes::{self, Standing};
use crate::clock;
use crate::log::Grant;
use crate::protocol::error::{Code, Error};
use crate::protocol::ids::{self, TENANT_THREAD};
use crate::protocol::kinds::KindClass;
use crate::store::Store;

/// Lookups that read all threads of two users and run at a time, for all users together.
const LOOKUPS: usize = 2;

#[derive(Clone)]
pub struct Rights {
    store: Arc<Store>,
    lookups: Arc<Semaphore>,
}

impl Rights {
    pub fn new(store: Arc<Store>) -> Rights {
        Rights { store, lookups: Arc::new(Semaphore::new(LOOKUPS)) }
    }

    /// By which right the user may publish an event of this class in the thread.
    pub fn to_publish(&self, who: &Principal, thread: &str, class: KindClass) -> Result<Grant, Error> {
        if ids::is_reserved(thread) {
            scopes::publish_reserved(who.scopes, class, thread, || self.may_write_to(who, thread))
        } else {
            let granted = scopes::publish(who.scopes, class, || self.standing(who, thread));
            match granted {
                // A stranger, but for the time of its work.
                Err(error) if error.code == Code::NotFound && self.holds_lease(who, thread)? => Ok(Grant::Scope),
                granted => granted,
            }
        }
    }

    /// What the user is in a thread, now.
    pub fn standing(&self, who: &Principal, thread: &str) -> Result<Standing, Error> {
        let is_member = || self.store.is_member(&who.tenant, thread, &who.user);
        if is_member()? {
            return Ok(Standing::Member);
        }
        if self.store.thread(&who.tenant, thread)?.is_none() {
            return Ok(Standing::NoThread);
        }
        // Asked again: the thread may have been made, with its first member, between the two lookups.
        Ok(if is_member()? { Standing::Member } else { Standing::Stranger })
    }

    /// Whether the user may write to an inbox without a scope for it: to the own one, and to those of people met in a
    /// thread.
    fn may_write_to(&self, who: &Principal, inbox: &str) -> Result<bool, Error> {
        match ids::inbox_of(inbox) {
            Some(user) if *user == *who.user => Ok(true),
            Some(user) => match self.store.share_a_thread(&who.tenant, &who.user, user)? {
                Some(share) => Ok(share),
                // Rare: what `look_up` found was forgotten again, for many others who were asked about.
                None => Ok(self.store.look_up_shared_thread(&who.tenant, &who.user, user)?),
            },
            None => Ok(false),
        }
    }

    /// Whether it takes a while to say if the user may write to this inbox: [`Rights::look_up`] comes first then.
    pub fn must_look_up(&self, who: &Principal, thread: &str) -> Result<bool, Error> {
        match ids::inbox_of(thread) {
            Some(user) if *user != *who.user && !(who.scopes.agent || who.scopes.admin) => {
                Ok(self.store.share_a_thread(&who.tenant, &who.user, user)?.is_none())
            }
            Some(_) | None => Ok(false),
        }
    }

    /// Looks up whether two users with very many threads share one, so that it can be said at once. Off the runtime's
    /// workers, and only a few at a time: others wait here, and nowhere else.
    pub async fn look_up(&self, who: &Principal, thread: &str) {
        let Some(user) = ids::inbox_of(thread).map(str::to_owned) else { return };
        let Ok(_permit) = self.lookups.acquire().await else { return };
        let (store, who) = (self.store.clone(), who.clone());
        let looked_up = move || store.look_up_shared_thread(&who.tenant, &who.user, &user);
        // Whoever asks again hears of the error then.
        if let Ok(Err(error)) = tokio::task::spawn_blocking(looked_up).await {
            tracing::warn!(%error, "the threads of two users were not looked up");
        }
    }

    /// Whether the user may signal in the thread: as one who may write there.
    pub fn may_signal(&self, who: &Principal, thread: &str) -> Result<(), Error> {
        if ids::is_reserved(thread) {
            let may_write = || self.may_write_to(who, thread);
            return scopes::publish_reserved(who.scopes, KindClass::Custom, thread, may_write).map(drop);
        }
        if who.scopes.agent || who.scopes.admin {
            return self.head(who, thread).map(drop);
        }
        scopes::may_publish(who.scopes)?;
        let member = self.store.is_member(&who.tenant, thread, &who.user)?;
        if member { Ok(()) } else { Err(Error::no_thread()) }
    }

    /// Whether the user may read the thread now.
    pub fn may_read(&self, who: &Principal, thread: &str) -> Result<(), Error> {
        let may = if scopes::reads_by_scope(who.scopes) {
            true
        } else if ids::is_reserved(thread) {
            thread == TENANT_THREAD || ids::inbox_of(thread) == Some(&*who.user) || self.works_in(who, thread)?
        } else {
            self.store.is_member(&who.tenant, thread, &who.user)? || self.works_in(who, thread)?
        };
        if may { Ok(()) } else { Err(Error::no_thread()) }
    }

    /// Whether the user is an agent that has an open run on the thread, or a lease on its work: agents read where they work.
    pub fn works_in(&self, who: &Principal, thread: &str) -> Result<bool, Error> {
        let has_run = || self.store.has_open_run(&who.tenant, thread, &who.user);
        Ok(who.scopes.agent && (has_run()? || self.holds_lease(who, thread)?))
    }

    /// Whether the user is an agent that has a lease on the thread's work.
    fn holds_lease(&self, who: &Principal, thread: &str) -> Result<bool, Error> {
        Ok(who.scopes.agent && self.store.has_lease(&who.tenant, thread, &who.user, clock::now_ms())?)
    }

    /// The threads that the user may read now, without those in which it holds a lease alone; nothing for whoever reads all of
    /// the tenant's. Reads the list of the user's threads: for threads that may block.
    pub fn readable_threads(&self, who: &Principal) -> Result<Option<Vec<String>>, Error> {
        if scopes::reads_by_scope(who.scopes) {
            return Ok(None);
        }
        let mut threads = vec![TENANT_THREAD.to_owned(), ids::inbox(&who.user)];
        for thread in self.store.threads_of(&who.tenant, &who.user) {
            threads.push(thread?);
        }
        if who.scopes.agent {
            for thread in self.store.threads_of_open_runs(&who.tenant, &who.user) {
                threads.push(thread?);
            }
        }
        Ok(Some(threads))
    }

    /// The newest seq of a thread that is there; those that exist by their name always are.
    pub fn head(&self, who: &Principal, thread: &str) -> Result<u64, Error> {
        match self.store.thread(&who.tenant, thread)? {
            Some(row) => Ok(row.head),
            None if ids::is_reserved(thread) => Ok(0),
            None => Err(Error::no_thread()),
        }
    }

    /// The head of a thread that the user may read now.
    pub fn readable(&self, who: &Principal, thread: &str) -> Result<u64, Error> {
        let head = self.head(who, thread)?;
        self.may_read(who, thread)?;
        Ok(head)
    }

    /// Reads something of a thread on the user's behalf; `read` gets the thread's head. The one way to do so: the right is
    /// looked up before, so that a stranger learns nothing, and once more after, so that what was committed after a
    /// removal is not given out.
    pub fn read<T>(
        &self,
        who: &Principal,
        thread: &str,
        read: impl FnOnce(u64) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let head = self.readable(who, thread)?;
        let found = read(head)?;
        self.may_read(who, thread)?;
        Ok(found)
    }
}
