//! The opaque cursors of lists: a place, and a tag that binds it to its query and its user.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::protocol::error::{Code, Error};

/// Everything that makes the list what it is: its name, its user, its filters.
pub struct Scope([u8; 32]);

impl Scope {
    pub fn of(parts: &[&str]) -> Scope {
        let mut hasher = blake3::Hasher::new_derive_key("weft 2026-11 cursor of a list");
        for part in parts {
            hasher.update(&(part.len() as u64).to_be_bytes()).update(part.as_bytes());
        }
        Scope(*hasher.finalize().as_bytes())
    }

    fn tag(&self, place: &[u8]) -> [u8; 8] {
        let mut tag = [0; 8];
        tag.copy_from_slice(&blake3::keyed_hash(&self.0, place).as_bytes()[..8]);
        tag
    }

    pub fn seal(&self, place: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode([&self.tag(place)[..], place].concat())
    }

    /// The place in a cursor of this list.
    pub fn open(&self, text: &str) -> Result<Vec<u8>, Error> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| refused())?;
        let (tag, place) = bytes.split_first_chunk::<8>().ok_or_else(refused)?;
        if self.tag(place) == *tag { Ok(place.to_vec()) } else { Err(refused()) }
    }
}

/// The answer to a cursor of another list, or of none.
pub fn refused() -> Error {
    Error::new(Code::CursorInvalid, "the cursor is not of this list").at("cursor")
}

/// The place in a list that is sorted by one number.
pub fn number(place: &[u8]) -> Result<u64, Error> {
    Ok(u64::from_be_bytes(place.try_into().map_err(|_| refused())?))
}
