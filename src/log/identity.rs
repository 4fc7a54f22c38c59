//! Which log this is, and which of its generations.
//!
//! The id is random and never changes. The generation is another one from when the log may lack what it held before: an
//! older copy was put back, records were deleted, or its folder is a copy that now goes its own way. What clients and
//! projections know of the generation before may then be about other records, so on the wire each generation has an
//! [epoch](Identity::epoch) of its own.
//!
//! The number alone would not tell generations apart: an older copy that is put back twice begins a second generation
//! twice. So each has a random tag as well.

use crate::clock;

/// Generations before this one whose projections are still good; more are forgotten, the oldest first.
const CONTINUED: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub id: String,
    /// Counted from 1.
    pub generation: u32,
    /// Empty for the first generation.
    pub tag: String,
    /// Where each partition began when the generation did; empty when all began at 0. A log that begins later now has
    /// lost records since.
    pub starts: Vec<u64>,
    /// Generations whose projections, as far as this one shares their records, are good.
    pub continued: Vec<Continued>,
}

/// A generation before this one, which shares its records before `end` in each partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continued {
    pub epoch: String,
    pub end: u64,
}

/// Why a generation began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The log had records and no projections: most likely an older copy was put back.
    Restored,
    /// The log's folder is a copy.
    Copied,
    /// A person discarded the projections (`weft rebuild --discard`).
    Discarded,
    /// Damaged records were left out.
    Salvaged,
}

impl Cause {
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Restored => "restored",
            Cause::Copied => "copied",
            Cause::Discarded => "discarded",
            Cause::Salvaged => "salvaged",
        }
    }
}

/// What is done with a log that holds records and does not say which log it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfUnnamed<'a> {
    Refuse,
    /// A person's word: it becomes a generation after this epoch, which its projections have, or a log of its own.
    Name(Option<&'a str>),
}

impl Identity {
    /// A log's first generation.
    pub fn new(id: String) -> Identity {
        Identity { id, generation: 1, tag: String::new(), starts: Vec::new(), continued: Vec::new() }
    }

    /// A random id.
    pub fn random() -> Identity {
        Identity::new(clock::random_id().simple().to_string())
    }

    /// What an epoch says.
    pub fn of_epoch(epoch: &str) -> Identity {
        let parsed = epoch.split_once('.').and_then(|(id, rest)| {
            let (generation, tag) = rest.split_once('-')?;
            let generation = generation.parse().ok().filter(|generation| *generation > 1)?;
            Some(Identity { generation, tag: tag.to_owned(), ..Identity::new(id.to_owned()) })
        });
        parsed.unwrap_or_else(|| Identity::new(epoch.to_owned()))
    }

    /// What the wire and the projections call this generation: the id alone for the first one, as it was before there were
    /// others, then `<id>.<generation>-<tag>`.
    pub fn epoch(&self) -> String {
        match self.generation {
            ..=1 => self.id.clone(),
            generation => format!("{}.{generation}-{}", self.id, self.tag),
        }
    }

    /// The generation after this one. The log has offsets from `starts` to `end` now.
    pub fn next(&self, cause: Cause, starts: Vec<u64>, end: u64) -> Identity {
        let mut continued = Vec::new();
        if cause == Cause::Copied {
            continued.clone_from(&self.continued);
            continued.push(Continued { epoch: self.epoch(), end });
            let surplus = continued.len().saturating_sub(CONTINUED);
            continued.drain(..surplus);
        }
        let mut tag = clock::random_id().simple().to_string();
        tag.truncate(8);
        let generation = self.generation.saturating_add(1);
        Identity { id: self.id.clone(), generation, tag, starts, continued }
    }

    /// Whether projections that were made under `epoch` and have come to `positions` were made from these records.
    pub fn made(&self, epoch: &str, positions: &[u64]) -> bool {
        let shared = |it: &&Continued| it.epoch == epoch && positions.iter().all(|next| *next <= it.end);
        self.epoch() == epoch || self.continued.iter().find(shared).is_some()
    }

    /// Where a partition began when the generation did.
    pub fn start(&self, partition: usize) -> u64 {
        self.starts.get(partition).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_epoch_is_the_id_and_each_later_one_its_own() {
        let first = Identity::new("abc".to_owned());
        assert_eq!(first.epoch(), "abc");
        let next = || first.next(Cause::Restored, Vec::new(), 7);
        let (one, other) = (next(), next());
        assert!(one.epoch().starts_with("abc.2-"), "{}", one.epoch());
        assert_ne!(one.epoch(), other.epoch(), "two second generations are not one");
        for identity in [first.clone(), one.clone(), one.next(Cause::Copied, Vec::new(), 9)] {
            let parsed = Identity::of_epoch(&identity.epoch());
            assert_eq!((parsed.id, parsed.generation, parsed.tag), (identity.id, identity.generation, identity.tag));
        }
    }

    #[test]
    fn an_id_of_any_form_is_an_id() {
        for epoch in ["", "a.b", "a.1-x", "a.x-y", "01234567-89ab-cdef-0123-456789abcdef"] {
            assert_eq!(Identity::of_epoch(epoch), Identity::new(epoch.to_owned()), "{epoch}");
        }
    }

    #[test]
    fn a_copy_goes_on_with_what_both_share_and_no_other_generation_does() {
        let first = Identity::new("abc".to_owned());
        let copy = first.next(Cause::Copied, Vec::new(), 7);
        assert!(copy.made("abc", &[7, 3]) && copy.made(&copy.epoch(), &[100]));
        assert!(!copy.made("abc", &[8, 3]), "beyond what both share");
        let copy_of_copy = copy.next(Cause::Copied, Vec::new(), 9);
        assert!(copy_of_copy.made("abc", &[7]) && copy_of_copy.made(&copy.epoch(), &[9]));
        for cause in [Cause::Restored, Cause::Discarded, Cause::Salvaged] {
            let other = copy.next(cause, Vec::new(), 7);
            assert!(!other.made("abc", &[0]) && !other.made(&copy.epoch(), &[0]), "{cause:?}");
        }
    }
}
