//! `weft search`: events by their words.

use form_urlencoded::Serializer;
use serde_json::{Value, json};

use super::common::{Failure, Output, Server, Style, printable, when};
use super::tail::summary;
use crate::client::Http;

/// Characters of a thread's name that are shown, and of who wrote it.
const NAME: usize = 24;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to search for: words, '"a phrase"', pre*, 'this -not', this OR that, field:word (text, tool, arguments, result, title).
    #[arg(required = true)]
    pub words: Vec<String>,
    #[command(flatten)]
    pub server: Server,
    /// In this thread alone.
    #[arg(long)]
    pub thread: Option<String>,
    /// Of this user alone.
    #[arg(long)]
    pub from: Option<String>,
    /// Of this kind alone.
    #[arg(long)]
    pub kind: Option<String>,
    /// Of this run alone.
    #[arg(long)]
    pub run: Option<String>,
    /// From this time on (RFC 3339).
    #[arg(long, value_name = "TIME")]
    pub since: Option<String>,
    /// Before this time (RFC 3339).
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// The newest first, or the best.
    #[arg(long, value_parser = ["newest", "relevance"], default_value = "newest")]
    pub order: String,
    /// Show so many events before each one and after it.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=10))]
    pub around: u8,
    /// How many to find.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    pub limit: u16,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

impl Args {
    /// The path of a page of so many hits.
    fn path(&self, limit: u16, cursor: Option<&str>) -> String {
        // Each word of the command line as it was given; nobody is still typing the last one.
        let q = self.words.join(" ") + " ";
        let mut query = Serializer::new(String::new());
        query.append_pair("q", &q).append_pair("order", &self.order).append_pair("limit", &limit.to_string());
        let filters = [
            ("thread", &self.thread),
            ("from", &self.from),
            ("kind", &self.kind),
            ("run", &self.run),
            ("since", &self.since),
            ("until", &self.until),
        ];
        for (name, value) in filters {
            if let Some(value) = value {
                query.append_pair(name, value);
            }
        }
        if self.around > 0 {
            query.append_pair("around", &self.around.to_string());
        }
        if let Some(cursor) = cursor {
            query.append_pair("cursor", cursor);
        }
        format!("/v1/search?{}", query.finish())
    }
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mut http = Http::connect(&args.server.url, &args.server.token).await?;
    let out = Output::new();
    let (mut hits, mut cursor) = (Vec::new(), None::<String>);
    let page = loop {
        let limit = args.limit - hits.len() as u16;
        let mut page = http.get(&args.path(limit.min(100), cursor.as_deref())).await?;
        if let Value::Array(found) = page["hits"].take() {
            hits.extend(found);
        }
        cursor = page["next"].as_str().map(str::to_owned);
        if cursor.is_none() || hits.len() >= usize::from(args.limit) {
            break page;
        }
    };

    if args.json {
        let mut found = json!({"hits": hits, "complete_to": page["complete_to"]});
        for name in ["next", "partial", "corrected"] {
            if let Some(value) = page.get(name) {
                found[name] = value.clone();
            }
        }
        return out.line(found).map(drop);
    }
    if let Some(corrected) = page["corrected"].as_str() {
        out.line(format!("found for: {}", printable(corrected.trim())))?;
    }
    for hit in &hits {
        if !show(&out, hit)? {
            return Ok(());
        }
    }
    if hits.is_empty() {
        out.line("nothing was found")?;
    }
    if page["partial"] == true {
        out.line("the search was broken off: there may be more; narrow it")?;
    } else if cursor.is_some() {
        out.line("there is more: --limit")?;
    }
    Ok(())
}

/// A hit, with what is around it; false when the reader of the output has gone away.
fn show(out: &Output, hit: &Value) -> Result<bool, Failure> {
    let seq = hit["seq"].as_u64().unwrap_or_default();
    let around = || hit["around"].as_array().into_iter().flatten();
    let is_before = |event: &&Value| event["seq"].as_u64().is_some_and(|it| it < seq);
    for event in around().filter(is_before) {
        out.line(out.paint(Style::Dim, line(out, &hit["thread"], event, &text_of(event))))?;
    }
    let text = match &hit["highlights"][0] {
        Value::Null => text_of(&hit["event"]),
        highlight => marked(out, highlight),
    };
    let goes_on = out.line(line(out, &hit["thread"], &hit["event"], &text))?;
    for event in around().filter(|event| !is_before(event)) {
        out.line(out.paint(Style::Dim, line(out, &hit["thread"], event, &text_of(event))))?;
    }
    Ok(goes_on)
}

/// When, where, who, what.
fn line(out: &Output, thread: &Value, event: &Value, text: &str) -> String {
    let shown = |value: &Value| printable(value.as_str().unwrap_or_default()).chars().take(NAME).collect::<String>();
    let at = when(event["at"].as_str().unwrap_or_default());
    let place = out.paint(Style::Cyan, format!("{} {}", shown(thread), event["seq"]));
    format!("{at}  {place}  {}: {text}", shown(&event["from"]))
}

/// What an event says, in one line.
fn text_of(event: &Value) -> String {
    summary(event["kind"].as_str().unwrap_or_default(), &event["data"]).chars().take(200).collect()
}

/// A text with what was found in bold.
fn marked(out: &Output, highlight: &Value) -> String {
    let characters: Vec<char> = highlight["text"].as_str().unwrap_or_default().chars().collect();
    let place = |range: &Value| Some((range[0].as_u64()? as usize, range[1].as_u64()? as usize));
    let (mut text, mut at) = (String::new(), 0);
    let part =
        |from: usize, to: usize| printable(&characters.get(from..to).unwrap_or_default().iter().collect::<String>());
    for (from, to) in highlight["ranges"].as_array().into_iter().flatten().filter_map(place) {
        text += &part(at, from);
        text += &out.paint(Style::Bold, part(from, to));
        at = to;
    }
    text + &part(at, characters.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_is_a_query() {
        let args = Args {
            words: vec!["hello".into(), "-world".into()],
            server: Server { url: String::new(), token: String::new() },
            thread: Some("a&b".into()),
            from: None,
            kind: None,
            run: None,
            since: None,
            until: None,
            order: "newest".into(),
            around: 2,
            limit: 20,
            json: false,
        };
        let path = args.path(20, Some("c"));
        assert_eq!(path, "/v1/search?q=hello+-world+&order=newest&limit=20&thread=a%26b&around=2&cursor=c");
    }
}
