//! What the commands share: where the server is and who asks, tokens, colours.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use crate::auth::jwt;
use crate::auth::jwt::Claims;
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
    /// The token to show it (`weft token` makes one).
    #[arg(long, env = "WEFT_TOKEN", hide_env_values = true)]
    pub token: String,
}

/// A token that is good for `ttl_s` seconds.
pub fn mint(secret: &str, tenant: &str, sub: &str, scope: &str, ttl_s: u64) -> Result<String, Failure> {
    let now = clock::now_s();
    let claims = Claims {
        sub: sub.to_owned(),
        tenant: tenant.to_owned(),
        exp: now + ttl_s,
        scope: Some(scope.to_owned()).filter(|scope| !scope.is_empty()),
        nbf: None,
        iss: None,
        aud: None,
        iat: Some(now),
    };
    Ok(jwt::mint(secret, &claims)?)
}

/// All rows of a list that comes in pages. `path` has its query already.
pub async fn all_pages(http: &mut Http, path: &str, field: &str) -> Result<Vec<Value>, Failure> {
    let mut rows = Vec::new();
    let mut next = path.to_owned();
    loop {
        let mut page = http.get(&next).await?;
        match page[field].take() {
            Value::Array(found) => rows.extend(found),
            other => return Err(format!("the server sent no list of {field}: {other}").into()),
        }
        match page["next"].as_str() {
            Some(cursor) => next = format!("{path}&cursor={cursor}"),
            None => return Ok(rows),
        }
    }
}

/// Prints the rows of a list: as JSON under the name of their field, or as a table, or that there are none.
pub fn print_rows(
    json: bool,
    field: &str,
    none: &str,
    rows: &[Value],
    table: impl FnOnce(&[Value]) -> Table,
) -> Result<(), Failure> {
    let out = Out::new();
    match rows {
        _ if json => out.line(json!({ field: rows })),
        [] => out.line(none),
        rows => out.line(table(rows)),
    }
    .map(drop)
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

/// Standard output, with colours when a person reads it. A reader that goes away (`| head`) is the end, not an error.
pub struct Out {
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

/// No line is longer, whatever a terminal says of itself.
const MAX_COLUMNS: usize = 1_000;

impl Out {
    pub fn new() -> Out {
        let colours = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        Out { colours }
    }

    pub fn is_terminal(&self) -> bool {
        io::stdout().is_terminal()
    }

    /// How wide a line may be: what `COLUMNS` says, or the terminal; 100 where nobody says.
    pub fn columns(&self) -> usize {
        let said = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).filter(|columns| *columns > 0);
        said.or_else(terminal_columns).unwrap_or(100).min(MAX_COLUMNS)
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

    /// Writes a line; false when nobody reads any more.
    pub fn line(&self, text: impl Display) -> Result<bool, Failure> {
        let mut out = io::stdout().lock();
        match writeln!(out, "{text}").and_then(|()| out.flush()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

#[expect(unsafe_code, reason = "the standard library does not ask a terminal for its size")]
fn terminal_columns() -> Option<usize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel fills in one `winsize`, or nothing where standard output is no terminal.
    let asked = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    Some(usize::from(size.ws_col)).filter(|columns| asked == 0 && *columns > 0)
}

impl Default for Out {
    fn default() -> Out {
        Out::new()
    }
}

/// Text from other people, safe to print: a terminal must not obey what they wrote.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
