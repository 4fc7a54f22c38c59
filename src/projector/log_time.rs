//! Log time: the clock of a partition, made of the times that its records were stamped with. Pure.
//!
//! A record may be stamped by a clock that is wrong, and after a quiet night the first record is rightly hours later than
//! the one before it. One record cannot tell the two apart, the next one can: log time advances to a record's time only as
//! far as the record before it agrees, within [`AGREEMENT`]. It never goes back. So one record from the future moves log
//! time by no more than that, and after a gap the second record brings log time up to now.

use crate::store::Progress;

/// How far a record may be ahead of the record before it and still advance log time in full, in milliseconds.
const AGREEMENT: u64 = 60 * 60 * 1_000;

/// Advances a partition's log time by a record with the time `at`.
pub(super) fn advance(progress: &mut Progress, at: u64) {
    let agreed = at.min(progress.last_at.saturating_add(AGREEMENT));
    progress.log_time = progress.log_time.max(agreed);
    progress.last_at = at;
}

/// The newest time in the partition as far as its last record shows, whether it is confirmed or not.
pub(super) fn newest(progress: &Progress) -> u64 {
    progress.log_time.max(progress.last_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = AGREEMENT;
    const NOW: u64 = 500_000 * HOUR;

    /// Log time after each of these records.
    fn times(records: &[u64]) -> Vec<u64> {
        let mut progress = Progress::default();
        let advance = |at: &u64| {
            advance(&mut progress, *at);
            progress.log_time
        };
        records.iter().map(advance).collect()
    }

    #[test]
    fn log_time_follows_records_that_agree_and_never_goes_back() {
        let records = [NOW, NOW, NOW + 10, NOW - 20, NOW + HOUR, NOW + 5];
        assert_eq!(times(&records)[1..], [NOW, NOW + 10, NOW + 10, NOW + HOUR - 20, NOW + HOUR - 20]);
    }

    #[test]
    fn after_a_gap_the_second_record_brings_log_time_up() {
        let night = 9 * HOUR;
        assert_eq!(times(&[NOW, NOW, NOW + night, NOW + night + 7])[1..], [NOW, NOW + HOUR, NOW + night + 7]);
    }

    #[test]
    fn one_record_from_the_future_moves_log_time_by_an_hour_at_most() {
        let records = [NOW, NOW, NOW + 48 * HOUR, NOW + 1, NOW + 2 * HOUR, NOW + 2 * HOUR];
        assert_eq!(times(&records)[1..], [NOW, NOW + HOUR, NOW + HOUR, NOW + HOUR + 1, NOW + 2 * HOUR]);
    }
}
