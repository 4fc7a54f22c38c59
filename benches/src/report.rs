//! Figures beside their limits and beside what is possible bare, as a table and as JSON.

use std::path::PathBuf;

use comfy_table::{CellAlignment, Table, presets};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use weft::cli::common::{Failure, Output};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogKind {
    Embedded,
    Kafka,
}

impl LogKind {
    fn name(self) -> &'static str {
        match self {
            LogKind::Embedded => "embedded",
            LogKind::Kafka => "Kafka",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    More,
    Less,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    pub unit: String,
    pub better: Better,
    /// Its own limit, where that depends on how the bench was run.
    #[serde(default, skip_serializing)]
    pub limit: Option<f64>,
}

impl Figure {
    pub fn more(name: &str, value: f64, unit: &str) -> Figure {
        Figure { name: name.to_owned(), value, unit: unit.to_owned(), better: Better::More, limit: None }
    }

    pub fn less(name: &str, value: f64, unit: &str) -> Figure {
        Figure { name: name.to_owned(), value, unit: unit.to_owned(), better: Better::Less, limit: None }
    }

    /// With a limit of its own.
    pub fn at_most(self, limit: f64) -> Figure {
        Figure { limit: Some(limit), ..self }
    }

    fn keeps(&self, limit: f64) -> bool {
        match self.better {
            Better::More => self.value >= limit,
            Better::Less => self.value <= limit,
        }
    }

    /// How many times as good as `other`: above 1 is better, whichever way the unit runs.
    fn ratio(&self, other: f64) -> Option<f64> {
        let ratio = match self.better {
            Better::More => self.value / other,
            Better::Less => other / self.value,
        };
        ratio.is_finite().then_some(ratio)
    }
}

/// What Weft promises on two cores. A figure that is not listed here has a limit only if it brings its own.
const LIMITS: &[(LogKind, &str, f64)] = &[
    (LogKind::Embedded, "ack 1x1024", 60_000.0),
    (LogKind::Embedded, "ack 32x64", 60_000.0),
    (LogKind::Embedded, "ack 1x1", 1_500.0),
    (LogKind::Embedded, "published P50, 30 users 1000/s", 0.8),
    (LogKind::Embedded, "published P99, 30 users 1000/s", 3.0),
    (LogKind::Embedded, "delivered P50, 30 users 1000/s", 0.8),
    (LogKind::Embedded, "delivered P99, 30 users 1000/s", 3.0),
    (LogKind::Embedded, "published P99, 1000 users 1000/s", 5.0),
    (LogKind::Embedded, "delivered P99, 1000 users 1000/s", 5.0),
    (LogKind::Embedded, "fanout to 1000 readers", 400_000.0),
    (LogKind::Embedded, "fanout to 1000 readers: P99 to P50", 2.0),
    (LogKind::Embedded, "published P50, one at a time, beside 10000 readers 50/s", 5.0),
    (LogKind::Embedded, "published P99, one at a time, beside 10000 readers 50/s", 30.0),
    (LogKind::Embedded, "replay to 1 reader", 500_000.0),
    (LogKind::Embedded, "reconnect, 5000 clients missed 100: all level after", 10.0),
    (LogKind::Embedded, "published: mean of 30 users / mean of one", 1.3),
    (LogKind::Embedded, "published: mean of 30 users / mean of one with 990/s", 1.3),
    (LogKind::Embedded, "delivered: mean of 30 users / mean of one", 1.3),
    (LogKind::Embedded, "delivered: mean of 30 users / mean of one with 990/s", 1.3),
    (LogKind::Embedded, "piece at its reader P99, 200 runs 50/s in 1s", 100.0),
    (LogKind::Embedded, "piece at its reader P99, 200 runs 50/s in 10s", 100.0),
    (LogKind::Embedded, "pieces per record, 200 runs 50/s in 10s", 5.0),
    (LogKind::Embedded, "agent events, nothing merged", 20_000.0),
    (LogKind::Embedded, "work settled, 32 workers", 20_000.0),
    (LogKind::Embedded, "publish to worker P99, 1000/s", 5.0),
    (LogKind::Embedded, "memory per connection, 5000 idle", 10.0),
    (LogKind::Embedded, "rebuild", 100_000.0),
    (LogKind::Kafka, "ack 1x4096", 40_000.0),
    (LogKind::Kafka, "work settled, 32 workers", 10_000.0),
    (LogKind::Kafka, "published P99, 30 users 1000/s", 25.0),
    (LogKind::Kafka, "delivered P99, 30 users 1000/s", 25.0),
    (LogKind::Kafka, "reconnect, 5000 clients missed 100: all level after", 10.0),
    (LogKind::Kafka, "piece at its reader P99, 200 runs 50/s in 1s", 100.0),
    (LogKind::Kafka, "piece at its reader P99, 200 runs 50/s in 10s", 100.0),
    (LogKind::Kafka, "pieces per record, 200 runs 50/s in 10s", 5.0),
    (LogKind::Kafka, "agent events, nothing merged", 20_000.0),
    (LogKind::Kafka, "published: mean of 30 users / mean of one", 1.3),
    (LogKind::Kafka, "published: mean of 30 users / mean of one with 990/s", 1.3),
    (LogKind::Kafka, "delivered: mean of 30 users / mean of one", 1.3),
    (LogKind::Kafka, "delivered: mean of 30 users / mean of one with 990/s", 1.3),
];

/// Which bare figure a figure is compared with: that of the work which Weft cannot avoid.
const BARE: &[(LogKind, &str, &str)] = &[
    (LogKind::Embedded, "ack 1x1024", "bare synced appends of 1024"),
    (LogKind::Embedded, "ack 32x64", "bare synced appends of 1024"),
    (LogKind::Embedded, "ack 1x64", "bare synced appends of 100"),
    (LogKind::Embedded, "ack 1x1", "bare synced appends of 1"),
    (LogKind::Embedded, "ack 1x1 P50", "bare synced append P50"),
    (LogKind::Embedded, "ack 1x1 P99", "bare synced append P99"),
    (LogKind::Embedded, "published P50, 30 users 1000/s", "bare synced append P50"),
    (LogKind::Embedded, "published P99, 30 users 1000/s", "bare synced append P99"),
    (LogKind::Embedded, "replay to 1 reader", "bare store reads"),
    (LogKind::Embedded, "rebuild", "bare projection writes"),
    (LogKind::Kafka, "ack 1x4096", "bare Kafka produce, 4096 outstanding"),
    (LogKind::Kafka, "ack 32x128", "bare Kafka produce, 4096 outstanding"),
    (LogKind::Kafka, "ack 1x1", "bare Kafka produce, one at a time"),
    (LogKind::Kafka, "ack 1x1 P50", "bare Kafka produce P50"),
    (LogKind::Kafka, "ack 1x1 P99", "bare Kafka produce P99"),
    (LogKind::Kafka, "published P50, 30 users 1000/s", "bare Kafka produce P50"),
    (LogKind::Kafka, "published P99, 30 users 1000/s", "bare Kafka produce P99"),
    (LogKind::Kafka, "rebuild", "bare Kafka consume"),
];

#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub log: LogKind,
    pub figures: Vec<Figure>,
    /// The benches that failed, and why.
    #[serde(default)]
    pub failures: Vec<String>,
}

/// A figure as `--json` prints it.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    figure: &'a Figure,
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<f64>,
    /// How many times as good as the limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
}

impl Report {
    pub fn add(&mut self, bench: &str, measured: Result<Vec<Figure>, Failure>) {
        match measured {
            Ok(figures) => self.figures.extend(figures),
            Err(error) => self.failures.push(format!("{bench} failed: {error}")),
        }
    }

    pub fn json(&self) -> Result<String, Failure> {
        let figures: Vec<_> = self
            .figures
            .iter()
            .map(|figure| {
                let limit = self.limit(figure);
                Line { figure, limit, ratio: limit.and_then(|limit| figure.ratio(limit)) }
            })
            .collect();
        Ok(serde_json::json!({ "log": self.log, "figures": figures, "failures": self.failures }).to_string())
    }

    fn limit(&self, figure: &Figure) -> Option<f64> {
        let promised = LIMITS.iter().find(|(log, name, _)| *log == self.log && *name == figure.name);
        figure.limit.or(promised.map(|(_, _, limit)| *limit))
    }

    /// The one of `bare` that `figure` is compared with.
    fn bare<'a>(&self, figure: &Figure, bare: &'a [Figure]) -> Option<&'a Figure> {
        let (_, _, name) = BARE.iter().find(|(log, name, _)| *log == self.log && *name == figure.name)?;
        bare.iter().find(|figure| figure.name == *name)
    }

    /// The table for people; `bare` are the figures to compare the others with.
    pub fn table(&self, bare: &[Figure]) -> String {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header([self.log.name(), "measured", "", "limit", "× limit", "", "× bare", ""]);
        for figure in &self.figures {
            table.add_row(self.row(figure, bare));
        }
        for column in [1, 3, 4, 6] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.to_string()
    }

    fn row(&self, figure: &Figure, bare: &[Figure]) -> [String; 8] {
        let limit = self.limit(figure);
        let ratio = limit.and_then(|limit| figure.ratio(limit));
        let verdict = match limit {
            Some(limit) if figure.keeps(limit) => "ok",
            Some(_) => "below",
            None => "",
        };
        let bare = self.bare(figure, bare);
        [
            figure.name.clone(),
            amount(figure.value),
            figure.unit.clone(),
            limit.map(amount).unwrap_or_default(),
            ratio.map(times).unwrap_or_default(),
            verdict.to_owned(),
            bare.and_then(|bare| figure.ratio(bare.value)).map(times).unwrap_or_default(),
            bare.map(|bare| bare.name.clone()).unwrap_or_default(),
        ]
    }
}

#[derive(Debug, clap::Args)]
pub struct ReportArgs {
    /// Files with the --json output of benches.
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
}

/// One table for each log, of all files together.
pub fn combine(args: &ReportArgs) -> Result<(), Failure> {
    let mut reports: Vec<Report> = Vec::new();
    for file in &args.files {
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let report: Report = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", file.display()))?;
        match reports.iter_mut().find(|known| known.log == report.log) {
            Some(known) => {
                known.figures.extend(report.figures);
                known.failures.extend(report.failures);
            }
            None => reports.push(report),
        }
    }
    for report in &reports {
        Output::new().line(format_args!("{}\n", report.table(&report.figures)))?;
        for failure in &report.failures {
            Output::new().line(format_args!("{failure}\n"))?;
        }
    }
    Ok(())
}

/// For durations in microseconds, up to two minutes.
pub fn micros() -> Result<Histogram<u64>, Failure> {
    Ok(Histogram::new_with_max(120_000_000, 3)?)
}

pub fn millis(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

/// The median; 0 of no values.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[odd / 2],
        even => (values[even / 2 - 1] + values[even / 2]) / 2.0,
    }
}

/// Thousands apart when large, decimals when small.
fn amount(value: f64) -> String {
    if value.abs() < 100.0 {
        return format!("{value:.2}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = if value < 0.0 { "-".to_owned() } else { String::new() };
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn times(ratio: f64) -> String {
    format!("{ratio:.2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_above_one_is_better_whichever_way_the_unit_runs() {
        assert_eq!(Figure::more("a", 120.0, "acks/s").ratio(60.0), Some(2.0));
        assert_eq!(Figure::less("a", 1.5, "ms").ratio(3.0), Some(2.0));
        assert_eq!(Figure::less("a", 0.0, "ms").ratio(3.0), None);
    }

    #[test]
    fn a_limit_of_its_own_goes_with_a_figure_and_may_be_zero() {
        let figures = vec![Figure::less("a", 0.0, "times").at_most(0.0), Figure::less("b", 1.0, "times").at_most(0.0)];
        let report = Report { log: LogKind::Embedded, figures, failures: Vec::new() };
        let read: Report = serde_json::from_str(&report.json().unwrap()).unwrap();
        let verdicts: Vec<_> = read.figures.iter().map(|figure| read.row(figure, &[])[5].clone()).collect();
        assert_eq!(verdicts, ["ok", "below"]);
    }

    #[test]
    fn the_median_is_the_one_in_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 3.0, 2.0].into_iter()), 2.5);
    }

    #[test]
    fn amounts_are_readable() {
        let shown = [0.814, 99.9, 100.0, 1234.5, 1_234_567.0, -1234.0].map(amount);
        assert_eq!(shown, ["0.81", "99.90", "100", "1,234", "1,234,567", "-1,234"]);
    }
}
