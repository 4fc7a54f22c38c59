//! What the commands share: the server and the token to use, making tokens, tables, colours.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;

use comfy_table::{Table, presets};
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::auth::jwt::{self, Claims};
use crate::client::Http;
use crate::clock;

/// Why a command failed, in words for the person who typed it.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Makes a token for a user (`sub`) with a scope.
pub type Mint<'a> = &'a (dyn Fn(&str, &str) -> Result<String, Failure> + Sync);

/// Which server to talk to, as whom.
#[derive(Debug, clap::Args)]
pub struct Server {
    /// Where the server is.
    #[arg(long, env = "WEFT_URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// The token to authenticate with (`weft token` makes one).
    #[arg(long, env = "WEFT_TOKEN", hide_env_values = true)]
    pub token: String,
}

/// What asks a command to end: Ctrl-C, or SIGTERM. From the moment on at which this is made neither ends the process by itself;
/// one that comes while nobody waits for it is kept.
pub struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    pub fn new() -> io::Result<Stop> {
        Ok(Stop { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    pub async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// A token that is good for `ttl_s` seconds.
pub fn mint(secret: &str, tenant: &str, sub: &str, scope: &str, ttl_s: u64) -> Result<String, Failure> {
    let now = clock::now_s();
    let claims = Claims {
        sub: sub.to_owned(),
        tenant: tenant.to_owned(),
        exp: now.saturating_add(ttl_s),
        scope: Some(scope.to_owned()).filter(|scope| !scope.is_empty()),
        nbf: None,
        iss: None,
        aud: None,
        iat: Some(now),
    };
    Ok(jwt::mint(secret, &claims)?)
}

/// How far a long command is, for a person to watch: on a terminal, in one line that is written again and again.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    is_terminal: bool,
}

impl Progress {
    pub fn on_terminal() -> Progress {
        Progress { is_terminal: io::stderr().is_terminal() }
    }

    pub fn show(self, text: impl Display) {
        if self.is_terminal {
            // An error in writing it changes nothing.
            drop(write!(io::stderr(), "\r{text}\x1b[K"));
        }
    }

    /// Ends the line.
    pub fn end(self) {
        if self.is_terminal {
            eprintln!();
        }
    }
}

/// Prints the rows of a list: as JSON under the name of their field, or as a table, or the text `none` where there are none.
pub fn print_rows(
    json: bool,
    field: &str,
    none: &str,
    rows: &[Value],
    table: impl FnOnce(&[Value]) -> Table,
) -> Result<(), Failure> {
    let mut list = List::new(json, field);
    if list.page(rows, table)?.is_continue() {
        list.end(none)?;
    }
    Ok(())
}

/// Prints the rows of a list page by page, as [`print_rows`] does all of them; of these tables the first alone has a header.
pub struct List<'a> {
    json: bool,
    field: &'a str,
    out: Output,
    rows: usize,
    /// The list of JSON is begun.
    begun: bool,
}

impl<'a> List<'a> {
    pub fn new(json: bool, field: &'a str) -> List<'a> {
        List { json, field, out: Output::new(), rows: 0, begun: false }
    }

    /// The rows of a list of the server's, as far as they are to be kept; one page of them is held at a time. `none` is said of
    /// a list without rows, and of one without any that are kept.
    pub async fn print(
        mut self,
        http: &mut Http,
        path: &str,
        keep: impl Fn(&Value) -> bool,
        none: [&str; 2],
        table: impl Fn(&[Value]) -> Table,
    ) -> Result<(), Failure> {
        let (field, mut there, mut goes_on) = (self.field, false, ControlFlow::Continue(()));
        http.each_page(path, field, |mut rows| {
            there |= !rows.is_empty();
            rows.retain(&keep);
            goes_on = self.page(&rows, &table)?;
            Ok::<_, Failure>(goes_on)
        })
        .await?;
        if goes_on.is_continue() { self.end(none[usize::from(there)]) } else { Ok(()) }
    }

    /// Breaks when the reader of the output has gone away.
    fn page(&mut self, rows: &[Value], table: impl FnOnce(&[Value]) -> Table) -> Result<ControlFlow<()>, Failure> {
        let mut text = String::new();
        if self.json {
            if !std::mem::replace(&mut self.begun, true) {
                text = format!("{{{}:[", json!(self.field));
            }
            for (at, row) in rows.iter().enumerate() {
                if self.rows + at > 0 {
                    text.push(',');
                }
                text += &row.to_string();
            }
        } else if !rows.is_empty() {
            let table = table(rows).to_string();
            for line in table.lines().skip(usize::from(self.rows > 0)) {
                text += line;
                text.push('\n');
            }
        }
        self.rows += rows.len();
        Ok(if self.out.put(&text)? { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    }

    /// `none` is for a list without rows.
    fn end(self, none: &str) -> Result<(), Failure> {
        let end = match self.rows {
            _ if self.json => "]}\n".to_owned(),
            0 => format!("{none}\n"),
            _ => return Ok(()),
        };
        self.out.put(&end).map(drop)
    }
}

/// A table whose lines are no wider than they may be, as far as one column can be cut for that: `flexible`, which is never cut
/// to less than [`LEAST`].
pub fn fitted(header: &[&str], mut rows: Vec<Vec<String>>, flexible: usize, columns: usize) -> Table {
    let width = |text: &str| text.chars().count();
    let widest = |at: usize| {
        let cells = rows.iter().map(|row| width(&row[at]));
        cells.chain([width(header[at])]).max().unwrap_or_default()
    };
    // Each column has a space on either side.
    let needed: usize = (0..header.len()).map(|at| widest(at) + 2).sum();
    let most = widest(flexible).saturating_sub(needed.saturating_sub(columns)).max(LEAST);
    for row in &mut rows {
        if width(&row[flexible]) > most {
            row[flexible] = row[flexible].chars().take(most - 1).chain(['~']).collect();
        }
    }
    let mut table = table(header);
    table.add_rows(rows);
    table
}

/// The least that is left of a cell that is cut.
const LEAST: usize = 8;

/// A time from the server for people: date, time and zone, `2026-11-27 04:30:12Z`. Any other text is shown whole.
pub fn when(at: &str) -> String {
    match (at.get(..10), at.get(10..11), at.get(11..19)) {
        (Some(date), Some("T"), Some(time)) if at.ends_with('Z') => format!("{date} {time}Z"),
        _ => printable(at),
    }
}

/// A time that a person names: RFC 3339, or how long ago (`90s`, `2h`, `7days`). In milliseconds since the Unix epoch.
pub fn point_in_time(text: &str) -> Result<u64, String> {
    let ago = || humantime::parse_duration(text).ok().and_then(|ago| u64::try_from(ago.as_millis()).ok());
    let time = clock::parse_rfc3339(text).or_else(|| Some(clock::now_ms().saturating_sub(ago()?)));
    time.ok_or_else(|| format!("{text:?} is neither a time (RFC 3339) nor how long ago (2h)"))
}

/// An empty table without lines.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    table
}

/// A JSON value as a cell of a table.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => printable(text),
        other => other.to_string(),
    }
}

/// Standard output, with colours on a terminal. A reader that goes away (`| head`) ends a command without an error.
pub struct Output {
    colours: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Style {
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
    Blue,
    Magenta,
    Cyan,
}

/// No line is longer, however wide a terminal claims to be.
const MAX_COLUMNS: usize = 1_000;

/// Whether to colour what goes to a stream: on a terminal, unless <https://no-color.org> says otherwise.
pub fn has_colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

impl Output {
    pub fn new() -> Output {
        Output { colours: has_colours(&io::stdout()) }
    }

    pub fn is_terminal(&self) -> bool {
        io::stdout().is_terminal()
    }

    /// How wide a line may be: `COLUMNS`, else the terminal's width, else 100.
    pub fn columns(&self) -> usize {
        let variable = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).filter(|columns| *columns > 0);
        variable.or_else(terminal_columns).unwrap_or(100).min(MAX_COLUMNS)
    }

    pub fn paint(&self, style: Style, text: impl Display) -> String {
        if !self.colours {
            return text.to_string();
        }
        let code = match style {
            Style::Bold => 1,
            Style::Dim => 2,
            Style::Red => 31,
            Style::Green => 32,
            Style::Yellow => 33,
            Style::Blue => 34,
            Style::Magenta => 35,
            Style::Cyan => 36,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// Writes a line; false when its reader has gone away.
    pub fn line(&self, text: impl Display) -> Result<bool, Failure> {
        self.put(format_args!("{text}\n"))
    }

    /// Writes a text as it is; false when its reader has gone away.
    fn put(&self, text: impl Display) -> Result<bool, Failure> {
        let mut out = io::stdout().lock();
        match write!(out, "{text}").and_then(|()| out.flush()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

#[expect(unsafe_code, reason = "the standard library has no call for a terminal's size")]
fn terminal_columns() -> Option<usize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel fills in one `winsize`, or nothing where standard output is not a terminal.
    let status = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    Some(usize::from(size.ws_col)).filter(|columns| status == 0 && *columns > 0)
}

impl Default for Output {
    fn default() -> Output {
        Output::new()
    }
}

/// Text from other people, safe to print: without characters that a terminal would execute.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A part of a path.
pub fn segment(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_wide_as_it_may_be_where_a_column_can_be_cut() {
        let rows = || vec![vec!["t1".to_owned(), "a long title ".repeat(20), "12".to_owned()]];
        for columns in [40, 80, 120] {
            let text = fitted(&["thread", "title", "head"], rows(), 1, columns).to_string();
            assert_eq!(text.lines().map(|line| line.chars().count()).max(), Some(columns), "{text}");
        }
        let narrow = fitted(&["thread", "title", "head"], rows(), 1, 5).to_string();
        assert!(narrow.contains("a long ~"), "{narrow}");
    }

    #[test]
    fn a_time_is_shown_with_its_date_and_zone_and_read_as_people_say_it() {
        assert_eq!(when("2026-11-27T04:30:12.345Z"), "2026-11-27 04:30:12Z");
        assert_eq!(when("yesterday"), "yesterday");
        assert_eq!(point_in_time("1970-01-01T00:00:01Z"), Ok(1_000));
        let (before, ago) = (clock::now_ms(), point_in_time("2h").expect("a time"));
        assert!((before - 7_200_000..=clock::now_ms() - 7_200_000).contains(&ago));
        assert!(point_in_time("soon").is_err());
    }
}
