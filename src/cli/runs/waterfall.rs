//! A run as a waterfall: one line for each step, tool call and message, with a bar for when it was and how long.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::{end_ms, ms};
use crate::cli::common::{Style, cell, printable};
use crate::protocol::kinds::{
    AGENT_CANCEL_REQUESTED, AGENT_FAILED, AGENT_RESUMED, AGENT_STARTED, AGENT_THINKING, AGENT_WAITING, TOOL_COMPLETED,
    TOOL_EXECUTING,
};

/// Columns of an offset, and of a duration.
const TIME: usize = 8;
/// Columns that a bar has at least.
const BAR: usize = 10;
/// Columns that a label has at most.
const LABEL: usize = 48;
/// Subruns deeper than this are not indented any further.
const MAX_DEPTH: usize = 8;

pub(super) struct StyledLine {
    pub(super) text: String,
    pub(super) style: Option<Style>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum RowMark {
    None,
    /// Has not ended.
    Open,
    Failed,
}

/// One line: times are milliseconds since the run began.
struct WaterfallRow {
    from: u64,
    /// Orders rows that begin at the same time.
    seq: u64,
    /// Its duration; absent for what has none.
    ms: Option<u64>,
    depth: usize,
    mark: RowMark,
    label: String,
}

/// A run's page in lines of at most `width` columns. `others` are runs of its thread; its subruns among them are shown.
pub(super) fn lines(run: &Value, others: &[Value], width: usize, unicode: bool) -> Vec<StyledLine> {
    let mut rows = steps(run);
    rows.extend(tools(run));
    rows.extend(messages(run));
    rows.extend(subruns(run, others));
    rows.sort_by_key(|row| (row.from, row.seq));
    let end = rows.iter().map(|row| row.from.saturating_add(row.ms.unwrap_or(0))).max().unwrap_or(0);
    let scale = Scale { width, total: end.max(number(&run["timings"]["total_ms"])).max(1), unicode };
    let mut lines = header(run, width);
    lines.extend(rows.iter().map(|row| scale.line(row)));
    if run["truncated"] == true {
        lines.push(StyledLine { text: "there is more than is shown here".to_owned(), style: Some(Style::Yellow) });
    }
    for line in &mut lines {
        line.text = cut(&line.text, width, unicode);
    }
    lines
}

fn header(run: &Value, width: usize) -> Vec<StyledLine> {
    let style = match run["state"].as_str() {
        Some("failed") => Style::Red,
        Some("open" | "waiting") => Style::Yellow,
        _ => Style::Bold,
    };
    let names = ["run", "agent", "thread", "state"].map(|name| format!("{name} {}", cell(&run[name])));
    let times = ["total", "queue", "thinking", "tool", "streaming", "waiting"]
        .map(|name| format!("{name} {}", duration(number(&run["timings"][format!("{name}_ms")]))));
    let mut lines = wrapped(&names, width, Some(style));
    lines.extend(wrapped(&times, width, None));
    if let Some(by) = run["cancel"]["requested"]["user"].as_str() {
        let text = format!("{} wants it cancelled", printable(by));
        lines.push(StyledLine { text, style: Some(Style::Yellow) });
    }
    lines
}

/// Words on as few lines as they fit.
fn wrapped(words: &[String], width: usize, style: Option<Style>) -> Vec<StyledLine> {
    let mut lines: Vec<StyledLine> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.text.chars().count() + 2 + word.chars().count() <= width => {
                line.text.push_str("  ");
                line.text.push_str(word);
            }
            _ => lines.push(StyledLine { text: word.clone(), style }),
        }
    }
    lines
}

/// The run's steps, without those that the rows of tools and messages show.
fn steps(run: &Value) -> Vec<WaterfallRow> {
    let closing: HashSet<u64> = list(&run["messages"]).iter().filter_map(|it| it["closed"]["seq"].as_u64()).collect();
    let shown_elsewhere = |step: &&Value| {
        matches!(step["kind"].as_str(), Some(TOOL_EXECUTING | TOOL_COMPLETED))
            || closing.contains(&number(&step["seq"]))
    };
    list(&run["steps"]).iter().filter(|step| !shown_elsewhere(step)).map(|step| step_row(run, step)).collect()
}

fn step_row(run: &Value, step: &Value) -> WaterfallRow {
    let (kind, seq) = (cell(&step["kind"]), number(&step["seq"]));
    let from = since(run, &step["at"]);
    let open = match &*kind {
        // Other steps may follow while the run waits, so the run says whether it still does.
        AGENT_WAITING => run["waiting"]["seq"] == seq,
        AGENT_THINKING => step["ms"].is_null(),
        _ => false,
    };
    let ms = match &*kind {
        AGENT_STARTED => Some(number(&run["timings"]["queue_ms"])),
        _ if open => Some(total(run).saturating_sub(from)),
        AGENT_THINKING | AGENT_WAITING => step["ms"].as_u64(),
        _ => None,
    };
    let mark = match &*kind {
        AGENT_FAILED => RowMark::Failed,
        _ if open => RowMark::Open,
        _ => RowMark::None,
    };
    WaterfallRow { from, seq, ms, depth: 0, mark, label: step_label(run, step, &kind) }
}

fn step_label(run: &Value, step: &Value, kind: &str) -> String {
    let what = kind.strip_prefix("agent_").unwrap_or(kind);
    match kind {
        AGENT_FAILED => format!("{what}: {}: {}", cell(&run["error"]["code"]), cell(&run["error"]["message"])),
        AGENT_RESUMED | AGENT_CANCEL_REQUESTED => format!("{what} by {}", cell(&step["from"])),
        _ => what.to_owned(),
    }
}

fn tools(run: &Value) -> impl Iterator<Item = WaterfallRow> {
    list(&run["tools"]).iter().map(|tool| {
        let from = since(run, &tool["began"]["at"]);
        let (mark, error) = match tool.get("error").filter(|error| !error.is_null()) {
            Some(error) => (RowMark::Failed, format!(": {}", printable(&cell(error)))),
            None if tool["completed"].is_null() => (RowMark::Open, String::new()),
            None => (RowMark::None, String::new()),
        };
        let ms = tool["ms"].as_u64().unwrap_or_else(|| total(run).saturating_sub(from));
        let label = format!("tool {} ({}){error}", cell(&tool["tool"]), cell(&tool["call"]));
        WaterfallRow { from, seq: number(&tool["began"]["seq"]), ms: Some(ms), depth: 0, mark, label }
    })
}

fn messages(run: &Value) -> impl Iterator<Item = WaterfallRow> {
    list(&run["messages"]).iter().map(|message| WaterfallRow {
        from: since(run, &message["began"]),
        seq: message["closed"]["seq"].as_u64().unwrap_or(u64::MAX),
        ms: message["ms"].as_u64(),
        depth: 0,
        mark: if message["closed"].is_null() { RowMark::Open } else { RowMark::None },
        label: format!("message {} ({} characters)", cell(&message["message"]), number(&message["chars"])),
    })
}

/// Runs that work for this one, and their subruns.
fn subruns(run: &Value, others: &[Value]) -> Vec<WaterfallRow> {
    let mut children: HashMap<&str, Vec<&Value>> = HashMap::new();
    for other in others {
        children.entry(other["parent_run"].as_str().unwrap_or_default()).or_default().push(other);
    }

    let mut rows = Vec::new();
    let mut parents = vec![(1, run)];
    while let Some((depth, parent)) = parents.pop() {
        // Removed, so that no run is shown twice.
        for child in children.remove(parent["run"].as_str().unwrap_or_default()).unwrap_or_default() {
            let (from, state) = (since(run, &child["started"]["at"]), cell(&child["state"]));
            rows.push(WaterfallRow {
                from,
                seq: number(&child["started"]["seq"]),
                ms: Some(end_ms(child).saturating_sub(ms(&child["started"]["at"]))),
                depth,
                mark: match &*state {
                    "failed" => RowMark::Failed,
                    "open" | "waiting" => RowMark::Open,
                    _ => RowMark::None,
                },
                label: format!("run {} ({}) {state}", cell(&child["run"]), cell(&child["agent"])),
            });
            parents.push((depth + 1, child));
        }
    }
    rows
}

/// How times become columns.
struct Scale {
    width: usize,
    total: u64,
    unicode: bool,
}

impl Scale {
    /// Columns of the bars: those that offset, duration, mark, label and the spaces between them leave.
    fn bar(&self) -> usize {
        let rest = self.width.saturating_sub(2 * TIME + 4);
        (rest - LABEL.min(rest / 2)).max(BAR)
    }

    fn column(&self, ms: u64, columns: usize) -> usize {
        (u128::from(ms) * columns as u128 / u128::from(self.total)) as usize
    }

    fn line(&self, row: &WaterfallRow) -> StyledLine {
        let columns = self.bar();
        let begin = self.column(row.from, columns).min(columns - 1);
        let (fill, open, point) = if self.unicode { ("█", "▒", "│") } else { ("#", "=", "|") };
        let bar = match row.ms {
            Some(ms) => {
                let end = self.column(row.from.saturating_add(ms), columns).clamp(begin + 1, columns);
                (if row.mark == RowMark::Open { open } else { fill }).repeat(end - begin)
            }
            None => point.to_owned(),
        };
        let bar = format!("{}{bar}", " ".repeat(begin));
        let (mark, style) = match row.mark {
            RowMark::None => (' ', None),
            RowMark::Open => ('>', Some(Style::Yellow)),
            RowMark::Failed => ('!', Some(Style::Red)),
        };
        let indent = "  ".repeat(row.depth.min(MAX_DEPTH));
        let took = row.ms.map(duration).unwrap_or_default();
        let text = format!("{:>TIME$} {bar:<columns$} {took:>TIME$} {mark}{indent}{}", duration(row.from), row.label);
        StyledLine { text: text.trim_end().to_owned(), style }
    }
}

/// The run's duration so far, in milliseconds.
fn total(run: &Value) -> u64 {
    number(&run["timings"]["total_ms"])
}

fn since(run: &Value, at: &Value) -> u64 {
    ms(at).saturating_sub(ms(&run["started"]["at"]))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A text of at most `width` columns; a longer one is cut.
pub(super) fn cut(text: &str, width: usize, unicode: bool) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let end = if unicode { "…" } else { "~" };
    text.chars().take(width.saturating_sub(1)).chain(end.chars()).collect()
}

/// A time in at most seven columns: `250ms`, `1.25s`, `2m05s`, `3h07m`.
pub(super) fn duration(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms}ms"),
        1_000..60_000 => format!("{}.{:02}s", ms / 1_000, ms % 1_000 / 10),
        60_000..3_600_000 => format!("{}m{:02}s", ms / 60_000, ms / 1_000 % 60),
        _ => format!("{}h{:02}m", ms / 3_600_000, ms / 60_000 % 60),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::clock::rfc3339;

    fn at(seq: u64, ms: u64) -> Value {
        json!({"seq": seq, "at": rfc3339(1_000_000 + ms)})
    }

    fn step(seq: u64, at_ms: u64, kind: &str, ms: Option<u64>) -> Value {
        json!({"seq": seq, "kind": kind, "at": rfc3339(1_000_000 + at_ms), "from": "ada", "ms": ms})
    }

    fn open_run() -> Value {
        json!({
            "run": "r", "thread": "t", "agent": "scout", "state": "open", "started": at(1, 0),
            "timings": {"queue_ms": 100, "thinking_ms": 200, "tool_ms": 300, "streaming_ms": 1_500, "waiting_ms": 0, "total_ms": 2_000},
            "steps": [
                step(1, 0, "agent_started", Some(100)), step(2, 100, "agent_thinking", Some(100)),
                step(3, 200, "tool_executing", Some(0)), step(4, 200, "tool_executing", Some(300)),
                step(5, 500, "tool_completed", Some(1_000)), step(6, 1_500, "agent_message", Some(0)),
                step(7, 1_500, "agent_cancel_requested", None),
            ],
            "tools": [
                {"call": "c1", "tool": "map", "began": at(3, 200), "completed": at(5, 500), "ms": 300, "error": "no \u{1b}map"},
                {"call": "c2", "tool": "x".repeat(200), "began": at(4, 200)},
            ],
            "messages": [
                {"message": "m1", "from": "scout", "chars": 12, "began": rfc3339(1_000_500), "closed": at(6, 1_500), "ms": 1_000},
                {"message": "m2", "from": "scout", "chars": 3, "began": rfc3339(1_001_500), "ms": 500},
            ],
        })
    }

    fn text(run: &Value, others: &[Value], width: usize, unicode: bool) -> Vec<String> {
        lines(run, others, width, unicode).into_iter().map(|line| line.text).collect()
    }

    #[test]
    fn each_step_call_and_message_has_a_bar_for_its_time() {
        let child = |run: &str, parent: &str, seq: u64, from: u64| json!({"run": run, "agent": "helper", "state": "completed", "parent_run": parent, "started": at(seq, from), "ended": at(seq + 1, from + 400)});
        let others =
            [child("deeper", "sub", 12, 1_200), child("sub", "r", 10, 1_000), child("foreign", "other", 14, 1_000)];
        let shown = text(&open_run(), &others, 80, false);
        let expected = [
            "run r  agent scout  thread t  state open",
            "total 2.00s  queue 100ms  thinking 200ms  tool 300ms  streaming 1.50s",
            "waiting 0ms",
            "     0ms #                                 100ms  started",
            "   100ms  ##                               100ms  thinking",
            "   200ms    ####                           300ms !tool map (c1): no  map",
            "   200ms    ===========================    1.80s >tool xxxxxxxxxxxxxxxxxxxxxxxx~",
            "   500ms        ###############            1.00s  message m1 (12 characters)",
            "   1.00s                ######             400ms    run sub (helper) completed",
            "   1.20s                   ######          400ms      run deeper (helper) compl~",
            "   1.50s                       |                  cancel_requested by ada",
            "   1.50s                       ========    500ms >message m2 (3 characters)",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn no_line_is_too_wide_and_none_has_control_characters() {
        for width in [1, 20, 40, 80, 300] {
            for unicode in [false, true] {
                for line in text(&open_run(), &[], width, unicode) {
                    assert!(line.chars().count() <= width, "{line}");
                    assert!(!line.contains(char::is_control), "{line}");
                }
            }
        }
    }

    #[test]
    fn fields_that_the_server_leaves_out_are_not_needed() {
        assert_eq!(text(&json!({}), &[], 80, false).len(), 2);
        let failed = json!({"state": "failed", "error": {"code": "stalled", "message": "nothing"}, "truncated": true,
            "steps": [step(1, 0, "agent_failed", None)]});
        let shown = text(&failed, &[], 80, false);
        assert!(shown[2].ends_with("!failed: stalled: nothing"), "{shown:#?}");
        assert_eq!(shown.len(), 4);
    }

    #[test]
    fn durations_are_short() {
        let shown: Vec<String> = [0, 999, 1_250, 59_999, 125_000, 11_220_000].map(duration).to_vec();
        assert_eq!(shown, ["0ms", "999ms", "1.25s", "59.99s", "2m05s", "3h07m"]);
    }
}
