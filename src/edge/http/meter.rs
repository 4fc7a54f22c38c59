//! What a request holds in memory, charged to the node's budget from before it is read until the last byte of the answer
//! has left.

use std::sync::Arc;
use std::time::Duration;

use crate::memory::{Charge, Pool, Refused};
use crate::protocol::error::{Code, Error};

/// How long a request waits for memory.
const WAIT: Duration = Duration::from_secs(2);
/// When to try again.
const RETRY_MS: u64 = 1_000;
/// The steps in which a charge grows.
const STEP: usize = 256 << 10;

/// What a request has charged, and how much of it is used.
pub struct Meter {
    charge: Charge,
    used: usize,
}

impl Meter {
    /// Charges what a request will hold at most, or, where that is not known, what it will hold as a rule.
    pub async fn begin(pool: &Pool, user: &Arc<str>, bytes: usize) -> Result<Meter, Error> {
        let charge = pool.charge(user, bytes, WAIT).await.map_err(refusal)?;
        Ok(Meter { charge, used: 0 })
    }

    /// Counts what is held in addition, and charges more if need be. Does not wait: what is charged already would have to be
    /// waited for by others.
    pub fn add(&mut self, bytes: usize) -> Result<(), Error> {
        self.used += bytes;
        if self.used <= self.charge.bytes() {
            return Ok(());
        }
        self.charge.grow_to(self.used.next_multiple_of(STEP)).map_err(refusal)
    }

    pub fn into_charge(self) -> Charge {
        self.charge
    }
}

fn refusal(refused: Refused) -> Error {
    match refused {
        Refused::Full => {
            Error::new(Code::Unavailable, "the server has no memory left for this request now").retry_after(RETRY_MS)
        }
        Refused::TooLarge => Error::new(Code::TooLarge, "the answer is larger than the server's memory allows"),
    }
}
