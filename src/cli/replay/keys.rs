//! What is typed while a replay runs: keys of a terminal, one by one and unseen, or lines of anything else.

use std::io::{self, IsTerminal, Read};

use tokio::sync::mpsc;

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// The next event at once.
    Step,
    /// Stop, or go on.
    Pause,
    Back,
    Forward,
    Faster,
    Slower,
    Quit,
}

pub struct Keys {
    typed: Option<mpsc::Receiver<Key>>,
    #[expect(dead_code, reason = "puts the terminal back when it is dropped")]
    terminal: Option<RawTerminal>,
}

impl Keys {
    /// Reads keys of a terminal; of anything else lines, if somebody is to step through them.
    pub fn open(steps: bool) -> Keys {
        let is_terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
        if !is_terminal && !steps {
            return Keys { typed: None, terminal: None };
        }
        let terminal = if is_terminal { RawTerminal::begin() } else { None };
        let (sender, typed) = mpsc::channel(16);
        // It ends with the process, or with its reader: a read of standard input cannot be cancelled.
        std::thread::spawn(move || {
            let mut parser = Parser::default();
            for byte in io::stdin().lock().bytes() {
                let Ok(byte) = byte else { return };
                if let Some(key) = parser.take(byte)
                    && sender.blocking_send(key).is_err()
                {
                    return;
                }
            }
        });
        Keys { typed: Some(typed), terminal }
    }

    /// The next key; `None` once no more come. Waits for ever where none ever came.
    pub async fn next(&mut self) -> Option<Key> {
        match &mut self.typed {
            Some(typed) => typed.recv().await,
            None => std::future::pending().await,
        }
    }

    pub fn close(&mut self) {
        self.typed = None;
    }
}

/// Keys out of bytes: an arrow is three of them.
#[derive(Default)]
struct Parser {
    escape: usize,
}

impl Parser {
    fn take(&mut self, byte: u8) -> Option<Key> {
        match (self.escape, byte) {
            (_, 0x1b) => {
                self.escape = 1;
                None
            }
            (1, b'[') => {
                self.escape = 2;
                None
            }
            (2, arrow) => {
                self.escape = 0;
                match arrow {
                    b'C' => Some(Key::Forward),
                    b'D' => Some(Key::Back),
                    b'A' => Some(Key::Faster),
                    b'B' => Some(Key::Slower),
                    _ => None,
                }
            }
            (_, byte) => {
                self.escape = 0;
                match byte {
                    b'\n' | b'\r' | b'n' => Some(Key::Step),
                    b' ' => Some(Key::Pause),
                    b'b' => Some(Key::Back),
                    b'f' => Some(Key::Forward),
                    b'+' => Some(Key::Faster),
                    b'-' => Some(Key::Slower),
                    b'q' => Some(Key::Quit),
                    _ => None,
                }
            }
        }
    }
}

/// A terminal that gives each key at once and shows none; as it was before, when this is dropped.
struct RawTerminal(libc::termios);

impl RawTerminal {
    #[expect(unsafe_code, reason = "the standard library has no call for a terminal's modes")]
    fn begin() -> Option<RawTerminal> {
        // SAFETY: a `termios` is plain data, which the first call fills in; both calls only read or write that.
        unsafe {
            let mut before: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(libc::STDIN_FILENO, &raw mut before) != 0 {
                return None;
            }
            let mut raw = before;
            // Ctrl-C stays a signal.
            raw.c_lflag &= !(libc::ICANON | libc::ECHO);
            (libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw) == 0).then_some(RawTerminal(before))
        }
    }
}

impl Drop for RawTerminal {
    #[expect(unsafe_code, reason = "the standard library has no call for a terminal's modes")]
    fn drop(&mut self) {
        // SAFETY: it sets what was read before. A terminal that is gone needs nothing.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_single_bytes_or_arrows() {
        let mut parser = Parser::default();
        let typed: Vec<Key> =
            b" \x1b[C\x1b[D\x1b[A\x1b[Bxn\nq\x1b[Z+".iter().filter_map(|byte| parser.take(*byte)).collect();
        let expected = [
            Key::Pause,
            Key::Forward,
            Key::Back,
            Key::Faster,
            Key::Slower,
            Key::Step,
            Key::Step,
            Key::Quit,
            Key::Faster,
        ];
        assert_eq!(typed, expected);
    }
}
