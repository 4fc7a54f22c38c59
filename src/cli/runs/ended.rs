//! Runs of all threads that have ended. No list of the server's has them: they are read from an export of the events that begin
//! and end runs.

use std::collections::HashMap;

use comfy_table::Table;
use serde_json::{Value, json};

use super::{ms, waterfall};
use crate::cli::common::{self, Failure, Output, cell, when};
use crate::client::Http;
use crate::protocol::kinds::{AGENT_CANCELLED, AGENT_COMPLETED, AGENT_FAILED, AGENT_STARTED};

/// The runs of one thread that have not ended yet where it is read, and all that have.
#[derive(Default)]
struct Runs {
    open: HashMap<String, Value>,
    ended: Vec<Value>,
    complete: bool,
}

/// Those that have ended, the newest last.
pub async fn list(http: &mut Http) -> Result<Vec<Value>, Failure> {
    let path = format!("/v1/export?kinds={AGENT_STARTED},{AGENT_COMPLETED},{AGENT_FAILED},{AGENT_CANCELLED}");
    let (mut runs, mut line) = (Runs::default(), Vec::new());
    http.get_in_pieces(&path, |piece| {
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            line.extend_from_slice(part);
            if line.ends_with(b"\n") {
                runs.take(&serde_json::from_slice(&line)?)?;
                line.clear();
            }
        }
        Ok::<_, Failure>(())
    })
    .await?;
    if !runs.complete {
        return Err("the list was cut off".into());
    }
    runs.ended.sort_by_key(|run| ms(&run["ended"]["at"]));
    Ok(runs.ended)
}

impl Runs {
    fn take(&mut self, line: &Value) -> Result<(), Failure> {
        match line["type"].as_str() {
            Some("event") => {}
            Some("thread") => {
                self.open.clear();
                return Ok(());
            }
            Some("end") => {
                self.complete = true;
                return Ok(());
            }
            Some("error") => return Err(format!("the list was cut off: {}", cell(&line["detail"])).into()),
            _ => return Ok(()),
        }
        let (run, mark) = (cell(&line["run"]), json!({"seq": line["seq"], "at": line["at"]}));
        let state = match line["kind"].as_str() {
            Some(AGENT_COMPLETED) => "completed",
            Some(AGENT_FAILED) => "failed",
            Some(AGENT_CANCELLED) => "cancelled",
            _ => {
                let agent = &line["data"]["agent"];
                let begun = json!({"run": run, "thread": line["thread"], "agent": agent, "started": mark});
                self.open.insert(run, begun);
                return Ok(());
            }
        };
        if let Some(mut begun) = self.open.remove(&run) {
            begun["state"] = state.into();
            begun["ended"] = mark;
            self.ended.push(begun);
        }
        Ok(())
    }
}

pub fn table(runs: &[Value]) -> Table {
    let rows = runs.iter().map(|row| {
        let (begun, ended) = (&row["started"]["at"], &row["ended"]["at"]);
        let [run, thread, agent, state] = ["run", "thread", "agent", "state"].map(|name| cell(&row[name]));
        let took = waterfall::duration(ms(ended).saturating_sub(ms(begun)));
        vec![run, thread, agent, state, ended.as_str().map_or_else(String::new, when), took]
    });
    common::fitted(&["run", "thread", "agent", "state", "ended", "took"], rows.collect(), 2, Output::new().columns())
}
