//! `weft groups`: the groups of work queues: listed, shown, set, deleted, paused, resumed.

use comfy_table::Table;
use serde_json::{Value, json};

use super::common::{self, Failure, Output, Server, Style, cell, print_rows, printable, segment};
use crate::client::{ClientError, Http};
use crate::protocol::work::{Backoff, Boost};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do.
    #[arg(value_enum, default_value = "list")]
    pub action: Action,
    /// The group, but for list.
    pub group: Option<String>,
    #[command(flatten)]
    pub server: Server,
    #[command(flatten)]
    pub settings: Settings,
    /// With pause and resume: only this thread.
    #[arg(long)]
    pub thread: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Action {
    /// List them with what waits; scope agent or admin.
    List,
    /// Show one with its settings; scope agent or admin.
    Show,
    /// Make one or change it: what is not given stays as it is; scope admin, as for all that follow.
    Set,
    /// Delete one, and with it what waits; the events stay in their threads.
    Delete,
    /// Give out no work of it until it is resumed.
    Pause,
    /// Give out work of it again.
    Resume,
}

/// What a group is like.
#[derive(Debug, clap::Args)]
pub struct Settings {
    /// With set: the kinds of events that are its work, with commas.
    #[arg(long, value_delimiter = ',')]
    pub kinds: Option<Vec<String>>,
    /// With set: where a new group begins.
    #[arg(long, value_parser = ["now", "start"])]
    pub from: Option<String>,
    /// With set: how long a worker has, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub lease_ms: Option<u64>,
    /// With set: how often an event is tried before it becomes a dead letter.
    #[arg(long, value_name = "N")]
    pub attempts: Option<u64>,
    /// With set: how long the second attempt waits, in milliseconds; each further one twice as long.
    #[arg(long, value_name = "MS")]
    pub backoff_min_ms: Option<u64>,
    /// With set: how long an attempt waits at most, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub backoff_max_ms: Option<u64>,
    /// With set: beyond so many events that wait the group is overflowing.
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    /// With set: what happens then.
    #[arg(long, value_parser = ["accept", "reject", "dead_letter"])]
    pub overflow: Option<String>,
    /// With set: whether a thread's events are worked on one at a time and in order.
    #[arg(long, value_parser = ["thread", "none"])]
    pub order: Option<String>,
    /// With set: by how much earlier an event of high priority counts as arrived, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub boost_high_ms: Option<u64>,
    /// With set: by how much later one of low priority does, in milliseconds.
    #[arg(long, value_name = "MS")]
    pub boost_low_ms: Option<u64>,
}

impl Settings {
    fn is_empty(&self) -> bool {
        let Settings { kinds, from, lease_ms, attempts, limit, overflow, order, .. } = self;
        let Settings { backoff_min_ms, backoff_max_ms, boost_high_ms, boost_low_ms, .. } = self;
        let times = [lease_ms, backoff_min_ms, backoff_max_ms, boost_high_ms, boost_low_ms];
        let (numbers, words) = (times.into_iter().chain([attempts, limit]), [from, overflow, order]);
        kinds.is_none() && words.iter().all(|word| word.is_none()) && numbers.into_iter().all(Option::is_none)
    }

    /// The body of a `PUT`: these settings, and otherwise those that the group has.
    fn over(&self, group: &Value) -> Value {
        let mut body = json!({});
        let mut set = |name: &str, given: Option<Value>| {
            if let Some(value) = given.or_else(|| group.get(name).cloned()) {
                body[name] = value;
            }
        };
        set("kinds", self.kinds.as_ref().map(|kinds| json!(kinds)));
        set("from", self.from.as_ref().map(|from| json!(from)));
        set("lease_ms", self.lease_ms.map(Value::from));
        set("attempts", self.attempts.map(Value::from));
        set("limit", self.limit.map(Value::from));
        set("overflow", self.overflow.as_ref().map(|overflow| json!(overflow)));
        set("order", self.order.as_ref().map(|order| json!(order)));
        let ms = |given: Option<u64>| given.map(Value::from);
        let later = self.boost_low_ms.map(|ms| Value::from(i64::try_from(ms).map_or(i64::MIN, |ms| -ms)));
        let backoff = [("min_ms", ms(self.backoff_min_ms)), ("max_ms", ms(self.backoff_max_ms))];
        let boost = [("high_ms", ms(self.boost_high_ms)), ("low_ms", later)];
        set("backoff", changed(group, "backoff", backoff, json!(Backoff::default())));
        set("boost", changed(group, "boost", boost, json!(Boost::default())));
        body
    }
}

/// A setting of several fields with those that are given, if any are.
fn changed(group: &Value, setting: &str, given: [(&str, Option<Value>); 2], default: Value) -> Option<Value> {
    let mut changed = group.get(setting).cloned().unwrap_or(default);
    let mut any = false;
    for (name, value) in given.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        (changed[name], any) = (value, true);
    }
    any.then_some(changed)
}

impl Args {
    /// Refuses what does not go together.
    pub fn check(&self) -> Result<(), &'static str> {
        match (self.action, &self.group) {
            (Action::List, Some(_)) => Err("to show one group: weft groups show GROUP"),
            (Action::List, None) if self.settings.is_empty() && self.thread.is_none() => Ok(()),
            (_, None) if self.action != Action::List => Err("say which group"),
            _ if self.thread.is_some() && !matches!(self.action, Action::Pause | Action::Resume) => {
                Err("--thread goes with pause and resume")
            }
            (Action::Set, _) => Ok(()),
            _ if self.settings.is_empty() => Ok(()),
            _ => Err("settings go with set: weft groups set GROUP --attempts 3"),
        }
    }
}

pub async fn run(args: Args) -> Result<(), Failure> {
    let mut http = Http::connect(&args.server.url, &args.server.token).await?;
    let path = format!("/v1/groups/{}", segment(args.group.as_deref().unwrap_or_default()));
    let group = match args.action {
        Action::List => return list(&args, &mut http).await,
        Action::Show => http.get(&path).await?,
        Action::Set => set(&args, &mut http, &path).await?,
        Action::Delete => http.delete(&path).await?,
        Action::Pause => http.post(&format!("{path}/pause"), &of_thread(&args)).await?,
        Action::Resume => http.post(&format!("{path}/resume"), &of_thread(&args)).await?,
    };
    print_one(&args, &group)
}

/// What is paused or resumed.
fn of_thread(args: &Args) -> Value {
    args.thread.as_ref().map_or_else(|| json!({}), |thread| json!({"thread": thread}))
}

async fn set(args: &Args, http: &mut Http, path: &str) -> Result<Value, ClientError> {
    let there = match http.get(path).await {
        Err(ClientError::Refused { status: 404, .. }) => json!({}),
        there => there?,
    };
    http.put(path, &args.settings.over(&there)).await
}

/// Each with what waits for it.
async fn list(args: &Args, http: &mut Http) -> Result<(), Failure> {
    let mut groups = Vec::new();
    for row in http.all_pages("/v1/groups?limit=1000", "groups").await? {
        match http.get(&format!("/v1/groups/{}", segment(&cell(&row["group"])))).await {
            Ok(group) => groups.push(group),
            // It was deleted meanwhile.
            Err(ClientError::Refused { status: 404, .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    print_rows(args.json, "groups", "no groups", &groups, table)
}

fn table(groups: &[Value]) -> Table {
    let mut table = common::table(&["group", "waiting", "oldest", "in flight", "workers", "state"]);
    for row in groups {
        let state = match (row["paused"] == true, row["overflowing"] == true) {
            (true, _) => "paused",
            (false, true) => "full",
            (false, false) => "active",
        };
        let oldest = row["oldest_ms"].as_u64().map_or_else(String::new, age);
        let group: String = cell(&row["group"]).chars().take(32).collect();
        let waiting = row["depth"].as_u64().unwrap_or(0).saturating_sub(row["in_flight"].as_u64().unwrap_or(0));
        let numbers = [waiting.to_string(), oldest, cell(&row["in_flight"]), cell(&row["workers"])];
        let [waiting, oldest, in_flight, workers] = numbers;
        table.add_row([group, waiting, oldest, in_flight, workers, state.to_owned()]);
    }
    table
}

/// How long ago, in two figures at most.
fn age(ms: u64) -> String {
    match ms / 1_000 {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3_600 => format!("{} min", s / 60),
        s @ 3_600..86_400 => format!("{} h", s / 3_600),
        s => format!("{} d", s / 86_400),
    }
}

fn print_one(args: &Args, group: &Value) -> Result<(), Failure> {
    let out = Output::new();
    if args.json {
        return out.line(group).map(drop);
    }
    let name = cell(&group["group"]);
    if group["deleted"] == true {
        return out.line(format!("{name} is deleted")).map(drop);
    }
    if let Some(thread) = group["thread"].as_str() {
        let state = if group["paused"] == true { "paused" } else { "resumed" };
        return out.line(format!("thread {} of {name} is {state}", printable(thread))).map(drop);
    }
    let state = match (group["paused"] == true, group["overflowing"] == true) {
        (true, true) => " (paused, overflowing)",
        (true, false) => " (paused)",
        (false, true) => " (overflowing)",
        (false, false) => "",
    };
    out.line(out.paint(Style::Bold, format!("{name}{state}")))?;

    let ms = |name: &str| group[name].as_u64().map(|ms| format!("{ms} ms"));
    let kinds = group["kinds"].as_array().into_iter().flatten().map(cell).collect::<Vec<_>>().join(" ");
    let paused = group["paused_threads"].as_array().filter(|threads| !threads.is_empty());
    let paused = paused.map(|threads| threads.iter().map(cell).collect::<Vec<_>>().join(" "));
    let backoff = format!("{} to {} ms", group["backoff"]["min_ms"], group["backoff"]["max_ms"]);
    let lines = [
        ("kinds", Some(kinds)),
        ("from", Some(cell(&group["from"]))),
        ("lease", ms("lease_ms")),
        ("attempts", Some(cell(&group["attempts"]))),
        ("backoff", Some(backoff)),
        ("limit", Some(format!("{} waiting, then {}", group["limit"], cell(&group["overflow"])))),
        ("order", Some(cell(&group["order"]))),
        ("boost", Some(format!("high {} ms, low {} ms", group["boost"]["high_ms"], group["boost"]["low_ms"]))),
        ("created", Some(cell(&group["created_at"]))),
        ("depth", group["depth"].as_u64().map(|depth| depth.to_string())),
        ("oldest", group["oldest_ms"].as_u64().map(age)),
        ("in flight", group["in_flight"].as_u64().map(|n| n.to_string())),
        ("paused", paused),
        ("workers", group["workers"].as_u64().map(|n| format!("{n} on this node"))),
    ];
    for (name, value) in lines.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        out.line(format!("{name:<10} {value}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_stays_as_it_is() {
        let none = || Settings {
            kinds: None,
            from: None,
            lease_ms: None,
            attempts: None,
            backoff_min_ms: None,
            backoff_max_ms: None,
            limit: None,
            overflow: None,
            order: None,
            boost_high_ms: None,
            boost_low_ms: None,
        };
        assert_eq!(none().over(&json!({})), json!({}), "a new group has the server's defaults");
        let there = json!({
            "group": "g", "kinds": ["x.a"], "from": "now", "lease_ms": 5_000, "attempts": 2,
            "backoff": {"min_ms": 10, "max_ms": 20}, "paused": true, "depth": 3,
        });
        let body = Settings { attempts: Some(3), backoff_max_ms: Some(30), ..none() }.over(&there);
        let backoff = json!({"min_ms": 10, "max_ms": 30});
        assert_eq!(
            body,
            json!({"kinds": ["x.a"], "from": "now", "lease_ms": 5_000, "attempts": 3, "backoff": backoff})
        );
        let body = Settings { boost_low_ms: Some(30), ..none() }.over(&json!({}));
        assert_eq!(body, json!({"boost": {"high_ms": 60_000, "low_ms": -30}}));
    }
}
