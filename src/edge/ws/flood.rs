//! Counts WebSocket frames that carry nothing (idle frames), from the bytes as they are read.
//!
//! The WebSocket library answers pings and joins fragments by itself, so a session does not see them, and they cost it no
//! command. A well-behaved client sends few; their rate is limited here, before the library sees them.

use std::time::{Duration, Instant};

/// Idle frames that a connection may send in the long run. Clients ping every few seconds, and some end a message with an
/// empty fragment: this is far more than that, and far less than what would load the server.
const A_SECOND: u32 = 100;
/// Idle frames at once: a client that was held up, or that cuts a few messages into small fragments, is no flood.
const AT_ONCE: u32 = 1_000;
/// A fragment with fewer bytes than this is idle. Even the largest message, cut into such fragments, is no flood.
const SMALL_FRAGMENT: u64 = 512;

/// What one idle frame costs, as time in which the bucket fills again.
const EACH: Duration = Duration::from_nanos(1_000_000_000 / A_SECOND as u64);
/// The whole bucket, as time.
const FULL: Duration = Duration::from_millis(AT_ONCE as u64 * 1_000 / A_SECOND as u64);

const FIN: u8 = 0x80;
const OPCODE: u8 = 0x0f;
const CONTINUATION: u8 = 0;
const FIRST_CONTROL: u8 = 8;
const MASKED: u8 = 0x80;
const MASKING_KEY: u64 = 4;

/// Limits the idle frames of one connection, by a token bucket.
#[derive(Debug)]
pub struct FloodGuard {
    parser: FrameParser,
    /// When the bucket is full again: the further ahead, the less is left in it.
    full_at: Instant,
    flooded: bool,
}

impl FloodGuard {
    pub fn new(now: Instant) -> FloodGuard {
        FloodGuard { parser: FrameParser::default(), full_at: now, flooded: false }
    }

    /// The next bytes of the stream; reads may end anywhere in a frame.
    pub fn read(&mut self, bytes: &[u8]) {
        let idle = self.parser.idle_in(bytes);
        // The clock is asked only when there is something to count.
        if idle > 0 {
            self.count(idle, Instant::now());
        }
    }

    fn count(&mut self, idle: u32, now: Instant) {
        self.full_at = self.full_at.max(now) + EACH.saturating_mul(idle);
        self.flooded |= self.full_at - now > FULL;
    }

    /// The size of the message that is being read, as far as its frames have told it; 0 between two messages.
    pub fn message_bytes(&self) -> u64 {
        self.parser.message_bytes()
    }

    /// Whether there were too many. Stays true.
    pub fn flooded(&self) -> bool {
        self.flooded
    }
}

#[derive(Debug, Default)]
struct FrameParser {
    at: FramePosition,
    message: MessageSize,
}

/// The message that is being read, in one frame or several, with control frames between them (RFC 6455, section 5.4).
#[derive(Debug, Default)]
struct MessageSize {
    /// Of its frames so far.
    bytes: u64,
    /// Its last frame has begun.
    last: bool,
}

/// Where in a frame the stream is (RFC 6455, section 5.2).
#[derive(Debug)]
enum FramePosition {
    /// After a frame's length, with so many bytes of masking key and payload to come. With 0 the next frame begins.
    Rest(u64),
    /// After a frame's first byte.
    Begun { first: u8 },
    /// In a frame's extended length, with so many bytes of it to come.
    Length { first: u8, masked: bool, missing: u8, length: u64 },
}

impl Default for FramePosition {
    fn default() -> FramePosition {
        FramePosition::Rest(0)
    }
}

impl FrameParser {
    fn message_bytes(&self) -> u64 {
        let read = self.message.last && matches!(self.at, FramePosition::Rest(0));
        if read { 0 } else { self.message.bytes }
    }

    /// How many idle frames have the end of their length in these bytes.
    fn idle_in(&mut self, mut bytes: &[u8]) -> u32 {
        let mut idle = 0;
        while let Some((&byte, rest)) = bytes.split_first() {
            if let FramePosition::Rest(rest @ 1..) = &mut self.at {
                // What does not fit a usize is more than was read.
                let here = usize::try_from(*rest).map_or(bytes.len(), |rest| rest.min(bytes.len()));
                *rest -= here as u64;
                bytes = &bytes[here..];
                continue;
            }
            idle += u32::from(self.header(byte));
            bytes = rest;
        }
        idle
    }

    /// Parses one byte of a header. True if the frame's length is known by this byte, and the frame is idle.
    fn header(&mut self, byte: u8) -> bool {
        let (first, masked, length) = match self.at {
            FramePosition::Rest(_) => {
                if self.message.last {
                    self.message = MessageSize::default();
                }
                self.at = FramePosition::Begun { first: byte };
                return false;
            }
            FramePosition::Begun { first } => {
                let masked = byte & MASKED != 0;
                let missing = match byte & !MASKED {
                    126 => 2,
                    127 => 8,
                    length => return self.after_length(first, masked, length.into()),
                };
                self.at = FramePosition::Length { first, masked, missing, length: 0 };
                return false;
            }
            FramePosition::Length { first, masked, missing, length } => {
                let length = length << 8 | u64::from(byte);
                if missing > 1 {
                    self.at = FramePosition::Length { first, masked, missing: missing - 1, length };
                    return false;
                }
                (first, masked, length)
            }
        };
        self.after_length(first, masked, length)
    }

    fn after_length(&mut self, first: u8, masked: bool, length: u64) -> bool {
        // The library refuses lengths that would overflow, and reads nothing after them.
        self.at = FramePosition::Rest(length.saturating_add(if masked { MASKING_KEY } else { 0 }));
        let opcode = first & OPCODE;
        if opcode < FIRST_CONTROL {
            let begun = if opcode == CONTINUATION { self.message.bytes } else { 0 };
            self.message = MessageSize { bytes: begun.saturating_add(length), last: first & FIN != 0 };
        }
        let fragment = first & FIN == 0 || opcode == CONTINUATION;
        opcode >= FIRST_CONTROL || length == 0 || (fragment && length < SMALL_FRAGMENT)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    struct Frame {
        first: u8,
        masked: bool,
        /// Longer than the payload needs, which the RFC forbids and the parser takes.
        wide: u8,
        length: usize,
    }

    impl Frame {
        fn bytes(&self) -> Vec<u8> {
            let mask = if self.masked { MASKED } else { 0 };
            let mut bytes = vec![self.first];
            match self.wide.max(if self.length > 65_535 { 2 } else { u8::from(self.length > 125) }) {
                0 => bytes.push(mask | self.length as u8),
                1 => {
                    bytes.push(mask | 126);
                    bytes.extend((self.length as u16).to_be_bytes());
                }
                _ => {
                    bytes.push(mask | 127);
                    bytes.extend((self.length as u64).to_be_bytes());
                }
            }
            // Bytes that would be control frames if they were taken for headers.
            bytes.resize(bytes.len() + self.length + if self.masked { 4 } else { 0 }, 0x89);
            bytes
        }

        fn idle(&self) -> bool {
            let (fin, opcode) = (self.first >= 128, self.first % 16);
            opcode >= 8 || self.length == 0 || ((!fin || opcode == 0) && self.length < 512)
        }
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let length = prop_oneof![
            4 => 0..4usize,
            4 => prop_oneof![Just(125usize), Just(126), Just(127), Just(511), Just(512), Just(65_535), Just(65_536)],
            1 => 0..70_000usize,
        ];
        (any::<u8>(), any::<bool>(), 0..3u8, length).prop_map(|(first, masked, wide, length)| Frame {
            first,
            masked,
            wide,
            length,
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn idle_frames_are_counted_wherever_the_reads_end(
            frames in proptest::collection::vec(frame(), 0..20),
            cuts in proptest::collection::vec(1..20usize, 1..50),
        ) {
            let idle = frames.iter().filter(|frame| frame.idle()).count() as u32;
            let stream: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
            let mut parser = FrameParser::default();
            prop_assert_eq!(parser.idle_in(&stream), idle, "at once");
            prop_assert!(matches!(parser.at, FramePosition::Rest(0)));

            let mut singly = FrameParser::default();
            prop_assert_eq!(stream.iter().map(|byte| singly.idle_in(&[*byte])).sum::<u32>(), idle, "byte by byte");

            let (mut cut_up, mut rest, mut counted) = (FrameParser::default(), &stream[..], 0);
            // A few bytes here, many there, so that cuts are in headers and payloads.
            for cut in cuts.iter().cycle() {
                let (part, after) = rest.split_at((cut * cut * cut).min(rest.len()));
                counted += cut_up.idle_in(part);
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(counted, idle, "in parts");
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2_000)) {
            FrameParser::default().idle_in(&bytes);
        }
    }

    #[test]
    fn headers_cut_at_each_byte() {
        for frame in [
            Frame { first: 0x89, masked: true, wide: 0, length: 5 },
            Frame { first: 0x01, masked: true, wide: 1, length: 300 },
            Frame { first: 0x00, masked: true, wide: 2, length: 511 },
            Frame { first: 0x81, masked: true, wide: 2, length: 70_000 },
        ] {
            let mut bytes = frame.bytes();
            bytes.extend([0x8a, 0x80, 0, 0, 0, 0]);
            for cut in 0..16.min(bytes.len()) {
                let mut parser = FrameParser::default();
                let counted = parser.idle_in(&bytes[..cut]) + parser.idle_in(&bytes[cut..]);
                assert_eq!(counted, 1 + u32::from(frame.idle()), "{frame:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn a_message_is_as_large_as_its_frames_have_told_until_the_last_has_ended() {
        let frame = |first, length| Frame { first, masked: true, wide: 0, length }.bytes();
        let mut parser = FrameParser::default();
        let mut size_after = |bytes: &[u8]| {
            parser.idle_in(bytes);
            parser.message_bytes()
        };
        let whole = frame(0x81, 70_000);
        assert_eq!(size_after(&whole[..9]), 0, "the length is not known yet");
        assert_eq!(size_after(&whole[9..20]), 70_000);
        assert_eq!(size_after(&whole[20..]), 0);

        assert_eq!(size_after(&frame(0x01, 600)), 600);
        assert_eq!(size_after(&frame(0x89, 5)), 600, "a ping between fragments");
        assert_eq!(size_after(&frame(0x00, 700)), 1_300);
        let last = frame(0x80, 800);
        assert_eq!(size_after(&last[..100]), 2_100);
        assert_eq!(size_after(&[&last[100..], &whole[..1]].concat()), 0, "the next has begun, and has told nothing");
    }

    #[test]
    fn the_longest_length_there_can_be_is_no_overflow() {
        let mut parser = FrameParser::default();
        assert_eq!(parser.idle_in(&[0x81, 0xff, 255, 255, 255, 255, 255, 255, 255, 255, 1, 2, 3]), 0);
        assert!(matches!(parser.at, FramePosition::Rest(rest) if rest == u64::MAX - 3));
    }

    #[test]
    fn a_thousand_at_once_pass_and_a_hundred_a_second() {
        let begin = Instant::now();
        let mut guard = FloodGuard::new(begin);
        guard.count(1_000, begin);
        assert!(!guard.flooded());
        for tenth in 1..1_000u64 {
            guard.count(10, begin + Duration::from_millis(100 * tenth));
            assert!(!guard.flooded(), "{tenth}");
        }
        let end = begin + Duration::from_millis(100 * 999);
        guard.count(1, end);
        assert!(guard.flooded());
        guard.count(1, end + Duration::from_secs(3_600));
        assert!(guard.flooded(), "it stays so");

        let mut guard = FloodGuard::new(begin);
        guard.count(1_001, begin + Duration::from_secs(60));
        assert!(guard.flooded(), "silence does not add to a full bucket");
    }

    #[test]
    fn the_largest_message_in_small_fragments_is_no_flood() {
        let mut guard = FloodGuard::new(Instant::now());
        let fragments = crate::protocol::command::MAX_FRAME / (SMALL_FRAGMENT as usize - 1) + 1;
        for _ in 0..fragments {
            guard.read(&Frame { first: 0, masked: true, wide: 0, length: 511 }.bytes());
        }
        assert!(!guard.flooded());
    }

    #[test]
    fn it_costs_a_connection_only_tens_of_bytes() {
        assert!(size_of::<Option<FloodGuard>>() <= 56, "{}", size_of::<Option<FloodGuard>>());
    }
}
