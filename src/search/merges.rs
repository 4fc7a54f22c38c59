//! Which segments become one: neighbours in time, so that the newest events are always in few of them, and so few that every
//! query can afford to look at all. Pure.

use std::ops::Range;

/// So many neighbours of about one size become one, with smaller ones between them.
const WIDTH: usize = 8;
/// A segment of so many events is left as it is, unless the index is so large that it would be one of very many.
const FULL: u32 = 250_000;
/// About how many full ones there may be.
const FULL_ONES: u64 = 32;

/// The segments to be merged next, of these sizes in the order of their times.
pub fn next(events: &[u32]) -> Option<Range<usize>> {
    let all: u64 = events.iter().map(|events| u64::from(*events)).sum();
    let full = u64::from(FULL).max(all / FULL_ONES);
    let most = events.iter().map(|events| level(*events)).max()?;
    (0..=most).find_map(|of_level| run(events, of_level, full))
}

/// Neighbours of this level and below that are worth to be one: each event is written once for each level.
fn run(events: &[u32], of_level: u32, full: u64) -> Option<Range<usize>> {
    let (mut begin, mut alike, mut sum) = (0, 0, 0);
    for (at, size) in events.iter().enumerate() {
        let is_full = u64::from(*size) * 2 > full;
        if level(*size) > of_level || is_full {
            (begin, alike, sum) = (at + 1, 0, 0);
            continue;
        }
        alike += usize::from(level(*size) == of_level);
        sum += u64::from(*size);
        if alike == WIDTH || (sum >= full && at > begin) {
            return Some(begin..at + 1);
        }
    }
    None
}

/// Segments of one level are about of one size.
fn level(events: u32) -> u32 {
    events.max(1).ilog2() / WIDTH.ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes after so many commits of so many events.
    fn after(commits: usize, events: u32) -> (Vec<u32>, u64) {
        let (mut sizes, mut written) = (Vec::new(), 0);
        for _ in 0..commits {
            sizes.push(events);
            while let Some(run) = next(&sizes) {
                let sum = sizes[run.clone()].iter().sum();
                written += u64::from(sum);
                sizes.splice(run, [sum]);
            }
        }
        (sizes, written)
    }

    #[test]
    fn segments_stay_few_and_each_event_is_written_few_times() {
        for (commits, events, most) in [(5_000, 1, 40), (100_000, 10, 60), (2_500, 4_000, 80), (20_000, 4_000, 100)] {
            let (sizes, written) = after(commits, events);
            let all = commits as u64 * u64::from(events);
            assert_eq!(sizes.iter().map(|size| u64::from(*size)).sum::<u64>(), all);
            assert!(sizes.len() <= most, "{commits} commits of {events}: {} segments", sizes.len());
            assert!(written <= all * 10, "{commits} commits of {events}: {written} written");
        }
    }

    #[test]
    fn nothing_is_merged_for_little() {
        assert_eq!(next(&[]), None);
        assert_eq!(next(&[5; 7]), None);
        assert_eq!(next(&[5; 8]), Some(0..8));
        assert_eq!(next(&[200_000; 20]), None, "they are full enough");
        assert_eq!(next(&[[1_000_000].as_slice(), &[5; 8]].concat()), Some(1..9));
    }
}
