//! Publishes that are due at fixed moments, whatever the server does. Latency counts from the moment at which a publish was
//! due, so that a stall counts for each that should have been sent meanwhile.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::net::tcp::OwnedWriteHalf;

use crate::publisher::Frame;
use crate::report::micros;
use weft::cli::common::Failure;

const WARM_UP_SECONDS: u64 = 1;
/// For the answers that are still missing when the last publish was due.
const GRACE: Duration = Duration::from_secs(30);
/// So that all are ready when the first publish is due.
const AHEAD: Duration = Duration::from_millis(200);

/// When each publish is due. The n-th is that of user n modulo `speakers`.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    start: Instant,
    rate: u64,
    speakers: u64,
    pub total: u64,
}

impl Plan {
    /// Begins after [`AHEAD`]; a second to warm up comes before the `seconds`.
    pub fn new(rate: usize, speakers: usize, seconds: u64) -> Plan {
        let rate = rate as u64;
        let total = rate * (seconds + WARM_UP_SECONDS);
        Plan { start: Instant::now() + AHEAD, rate, speakers: speakers as u64, total }
    }

    /// When what is due counts: the warm-up is over.
    pub fn begin(&self) -> Instant {
        self.due(self.rate * WARM_UP_SECONDS)
    }

    pub fn due(&self, number: u64) -> Instant {
        self.start + Duration::from_nanos(number * 1_000_000_000 / self.rate)
    }

    pub fn speakers(&self) -> u64 {
        self.speakers
    }

    pub fn by(&self, number: u64) -> u64 {
        number % self.speakers
    }

    /// How many publishes are this user's.
    pub fn of(&self, user: u64) -> u64 {
        if user < self.speakers { (self.total + self.speakers - 1 - user) / self.speakers } else { 0 }
    }

    fn counts(&self, number: u64) -> bool {
        number >= self.rate * WARM_UP_SECONDS
    }

    /// Records how long ago a publish was due, unless it was one to warm up.
    pub fn record(&self, histogram: &mut Histogram<u64>, number: u64) {
        if self.counts(number) {
            histogram.saturating_record(self.due(number).elapsed().as_micros() as u64);
        }
    }

    /// How long all publishes and their answers may take.
    pub fn patience(&self) -> Duration {
        self.due(self.total).saturating_duration_since(Instant::now()) + GRACE
    }
}

/// Publishes what is due, each speaker with its own writer. Runs on a thread of its own, since tokio's timers count whole
/// milliseconds, which is longer than what is measured. Gives how late this thread itself was.
pub fn talk(writers: &mut [(OwnedWriteHalf, Frame)], plan: Plan) -> Result<Histogram<u64>, Failure> {
    let mut late = micros()?;
    for number in 0..plan.total {
        let due = plan.due(number);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        plan.record(&mut late, number);
        let (writer, frame) = &mut writers[plan.by(number) as usize];
        write_all(writer, frame.numbered(number), due)?;
    }
    Ok(late)
}

pub fn write_all(writer: &OwnedWriteHalf, mut bytes: &[u8], due: Instant) -> Result<(), Failure> {
    while !bytes.is_empty() {
        match writer.try_write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::WouldBlock && due.elapsed() < GRACE => {
                std::thread::sleep(Duration::from_micros(100));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_publish_is_one_user_s() {
        let plan = Plan { total: 11_007, ..Plan::new(1000, 30, 10) };
        let counted: u64 = (0..30).map(|user| plan.of(user)).sum();
        assert_eq!(counted, plan.total);
        assert_eq!(plan.of(3), (0..plan.total).filter(|n| plan.by(*n) == 3).count() as u64);
        assert_eq!(plan.of(30), 0, "one who only listens");
    }
}
