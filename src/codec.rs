//! The frame around every row on disk, and the only place that encodes and decodes one.
//!
//! Format: `W` (magic) · codec (1 = bincode 2, standard configuration) · schema (the row's own version) · CRC-32 of the
//! payload, big-endian · payload. The version lets a later codec or row shape be read beside this one.

use bincode::{BorrowDecode, Encode};

const MAGIC: u8 = b'W';
const BINCODE_2: u8 = 1;
const HEADER: usize = 7;

/// Why a row cannot be what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("the row does not begin with a frame of Weft")]
    NoFrame,
    #[error("the row has codec {codec} and schema {schema}, which this version does not know")]
    UnknownVersion { codec: u8, schema: u8 },
    #[error("the row's checksum does not match")]
    Checksum,
    #[error("the row's payload does not decode: {0}")]
    Payload(String),
}

/// Frames a row.
pub fn encode<T: Encode>(schema: u8, row: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    out.extend_from_slice(&[MAGIC, BINCODE_2, schema, 0, 0, 0, 0]);
    bincode::encode_into_std_write(row, &mut out, bincode::config::standard())
        .expect("a Vec takes every write, and derived encodings of plain data have no errors of their own");
    let crc = crc32fast::hash(&out[HEADER..]);
    out[3..HEADER].copy_from_slice(&crc.to_be_bytes());
    out
}

/// The schema that a frame names, if there is a frame.
pub fn schema(bytes: &[u8]) -> Option<u8> {
    match bytes {
        [MAGIC, _, schema, ..] => Some(*schema),
        _ => None,
    }
}

/// Takes the frame off and decodes the row, borrowing from `bytes`. Trailing bytes are refused.
pub fn decode<'a, T: BorrowDecode<'a, ()>>(schema: u8, bytes: &'a [u8]) -> Result<T, CodecError> {
    let [MAGIC, codec, found, c0, c1, c2, c3, payload @ ..] = bytes else {
        return Err(CodecError::NoFrame);
    };
    if *codec != BINCODE_2 || *found != schema {
        return Err(CodecError::UnknownVersion { codec: *codec, schema: *found });
    }
    if crc32fast::hash(payload) != u32::from_be_bytes([*c0, *c1, *c2, *c3]) {
        return Err(CodecError::Checksum);
    }
    let (row, read) = bincode::borrow_decode_from_slice(payload, bincode::config::standard())
        .map_err(|error| CodecError::Payload(error.to_string()))?;
    if read == payload.len() {
        Ok(row)
    } else {
        Err(CodecError::Payload(format!("{} trailing bytes", payload.len() - read)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_comes_back_as_it_was() {
        let row = (7u64, "text".to_owned(), [1u8; 32]);
        assert_eq!(decode::<(u64, String, [u8; 32])>(3, &encode(3, &row)), Ok(row));
    }

    #[test]
    fn damage_and_foreign_rows_are_told_apart() {
        let good = encode(1, &"text".to_owned());
        let mut flipped = good.clone();
        *flipped.last_mut().expect("a frame is never empty") ^= 1;
        assert_eq!(decode::<String>(1, &flipped), Err(CodecError::Checksum));
        assert_eq!(decode::<String>(2, &good), Err(CodecError::UnknownVersion { codec: 1, schema: 1 }));
        assert_eq!(decode::<String>(1, b"{}"), Err(CodecError::NoFrame));
        assert!(matches!(decode::<u8>(1, &good), Err(CodecError::Payload(_))));
    }
}
