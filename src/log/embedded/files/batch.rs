//! What RocksDB writes for one batch of ours, read by ourselves. Pure: bytes in, operations out.
//!
//! Format: sequence number (8 bytes) · number of operations (4) · operations: tag · for other families than the default one
//! its number (varint) · key and, of a put, value, each with its length (varint) before it. Little-endian.

/// One operation of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op<'a> {
    Put { family: u32, key: &'a [u8], value: &'a [u8] },
    Delete { family: u32, key: &'a [u8] },
}

/// A batch as it stands in a record of the write-ahead log.
#[derive(Debug, PartialEq, Eq)]
pub struct WriteAheadBatch<'a> {
    /// The sequence number of its first operation.
    pub sequence: u64,
    pub count: u32,
    pub ops: Vec<Op<'a>>,
    /// Whether all its operations could be read, as many as it says.
    pub is_whole: bool,
}

impl<'a> WriteAheadBatch<'a> {
    /// Reads a batch, as far as it can be read. `None` when it has no header.
    pub fn read(bytes: &'a [u8]) -> Option<WriteAheadBatch<'a>> {
        let (header, mut rest) = bytes.split_at_checked(12)?;
        let sequence = u64::from_le_bytes(header[..8].try_into().ok()?);
        let count = u32::from_le_bytes(header[8..].try_into().ok()?);
        let mut ops = Vec::new();
        while !rest.is_empty() {
            match read_op(&mut rest) {
                Some(op) => ops.push(op),
                None => return Some(WriteAheadBatch { sequence, count, ops, is_whole: false }),
            }
        }
        let is_whole = ops.len() == count as usize;
        Some(WriteAheadBatch { sequence, count, ops, is_whole })
    }

    /// The sequence number that the next batch has.
    pub fn next_sequence(&self) -> u64 {
        self.sequence + u64::from(self.count)
    }
}

/// Takes one operation off the front; leaves `rest` as it is if there is none.
pub fn read_op<'a>(rest: &mut &'a [u8]) -> Option<Op<'a>> {
    let mut bytes = *rest;
    let (tag, after) = bytes.split_first()?;
    bytes = after;
    let family = match tag {
        0 | 1 => 0,
        4 | 5 => u32::try_from(varint(&mut bytes)?).ok()?,
        // No batch of ours has any other operation.
        _ => return None,
    };
    let key = prefixed(&mut bytes)?;
    let op = match tag {
        0 | 4 => Op::Delete { family, key },
        _ => Op::Put { family, key, value: prefixed(&mut bytes)? },
    };
    *rest = bytes;
    Some(op)
}

/// Takes a number off the front: seven bits a byte, the lowest first, the eighth says that more follow.
pub fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Takes bytes off the front that have their length before them.
pub fn prefixed<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(varint(bytes)?).ok()?;
    let (found, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(found)
}

#[cfg(test)]
mod tests {
    use rocksdb::WriteBatch;

    use super::*;

    #[test]
    fn a_batch_of_rocksdb_s_is_read_as_it_was_made() {
        let mut made = WriteBatch::default();
        made.put(b"epoch", b"e");
        made.put(vec![7; 200], vec![9; 40_000]);
        made.delete(b"gone");
        let batch = WriteAheadBatch::read(made.data()).expect("a header");
        assert_eq!((batch.count, batch.is_whole), (3, true));
        assert_eq!(batch.ops[0], Op::Put { family: 0, key: b"epoch", value: b"e" });
        assert_eq!(batch.ops[1], Op::Put { family: 0, key: &[7; 200], value: &[9; 40_000] });
        assert_eq!(batch.ops[2], Op::Delete { family: 0, key: b"gone" });
        let cut = WriteAheadBatch::read(&made.data()[..made.data().len() - 1]).expect("a header");
        assert_eq!((cut.ops.len(), cut.is_whole), (2, false));
        assert_eq!(WriteAheadBatch::read(&made.data()[..11]), None);
    }
}
