//! What a server's bytes come to, in whichever protocol.

use crate::publisher::number_in;
use weft::cli::common::Failure;

/// What came in.
#[derive(Debug)]
pub enum Got<'a> {
    /// A publish was answered.
    Answer {
        id: u64,
        raw: &'a [u8],
    },
    /// A message, by the number in its data.
    Message {
        number: u64,
        raw: &'a [u8],
    },
    Other(&'a [u8]),
}

pub fn message_or_other(raw: &[u8], each: &mut impl FnMut(Got) -> Result<(), Failure>) -> Result<(), Failure> {
    each(match number_in(raw) {
        Some(number) => Got::Message { number, raw },
        None => Got::Other(raw),
    })
}

pub fn leading_number(bytes: &[u8]) -> u64 {
    let digits = bytes.iter().take(19).take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'))
}

pub fn said(text: &[u8]) -> Failure {
    format!("the server said {}", String::from_utf8_lossy(text)).into()
}
