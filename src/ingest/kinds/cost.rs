//! What checking an event against a schema may cost: bounded before it begins, from the schema and from how much there is to
//! check.
//!
//! For each value of the data the bound counts every part of the schema that may be applied to it, whichever value it is and
//! whichever branches are taken. A step is about ten nanoseconds of one processor.

/// What one event's check may cost, in steps.
pub const MAX_STEPS: u64 = 300_000;
/// A byte's share of a step: a sixteenth.
const PER_BYTE: u64 = 16;
/// What it takes to hash or compare a value again for `uniqueItems`.
const HASHED: u64 = 8;

/// How much data there is.
#[derive(Debug, Clone, Copy)]
pub struct Amount {
    pub values: u64,
    pub objects: u64,
    pub numbers: u64,
    pub bytes: u64,
}

/// Steps for each value, and so many more for each object and for each number; and sixteenths of steps for each byte.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Steps {
    pub value: u64,
    pub object: u64,
    pub number: u64,
    pub byte: u64,
    /// How often a value is part of a list whose items must differ.
    pub hashed: u64,
}

impl Steps {
    pub fn per_value(value: u64) -> Steps {
        Steps { value, ..Steps::default() }
    }

    /// Both are applied to the same value.
    pub fn and(self, other: Steps) -> Steps {
        Steps {
            value: self.value.saturating_add(other.value),
            object: self.object.saturating_add(other.object),
            number: self.number.saturating_add(other.number),
            byte: self.byte.saturating_add(other.byte),
            hashed: self.hashed.saturating_add(other.hashed),
        }
    }

    /// One or the other is.
    pub fn or(self, other: Steps) -> Steps {
        Steps {
            value: self.value.max(other.value),
            object: self.object.max(other.object),
            number: self.number.max(other.number),
            byte: self.byte.max(other.byte),
            hashed: self.hashed.max(other.hashed),
        }
    }

    /// What checking so much data takes at most.
    pub fn for_all(self, of: Amount) -> u64 {
        let per_value = self.value.saturating_add(self.hashed.saturating_mul(HASHED));
        let values = per_value.saturating_mul(of.values);
        let objects = self.object.saturating_mul(of.objects);
        let numbers = self.number.saturating_mul(of.numbers);
        let bytes = self.byte.saturating_mul(of.bytes) / PER_BYTE;
        values.saturating_add(objects).saturating_add(numbers).saturating_add(bytes)
    }
}

/// What a schema takes: of the value that it is applied to, and of each that is inside that one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Applied {
    pub here: Steps,
    pub inside: Steps,
}

impl Applied {
    /// Both are applied to the same value.
    pub fn and(self, other: Applied) -> Applied {
        Applied { here: self.here.and(other.here), inside: self.inside.and(other.inside) }
    }

    /// The most that it takes of any one value. A value is hashed with each list that it is in, the inner ones and the outer.
    pub fn most(self) -> Steps {
        Steps { hashed: self.here.hashed.saturating_add(self.inside.hashed), ..self.here.or(self.inside) }
    }
}
