//! Runs as OpenTelemetry's traces, in OTLP's JSON: a run is a span `invoke_agent`, a call of a tool a span `execute_tool`
//! under it, by the semantic conventions of [`SCHEMA_URL`]. A run that works for another one is under that, in one trace.
//!
//! A line for each span, when its last event comes: a run that has not ended is not there yet.

use serde_json::{Map, Value, json};

use crate::clock;
use crate::protocol::event::StoredFrame;
use crate::protocol::kinds::{AGENT_CANCELLED, AGENT_FAILED};

/// The version of the conventions that all names here are of.
pub const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.37.0";
/// `SPAN_KIND_INTERNAL`.
const INTERNAL: u8 = 1;
/// `STATUS_CODE_ERROR`.
const ERROR: u8 = 2;

/// Whose span it is.
pub struct SpanOwner<'a> {
    pub tenant: &'a str,
    pub thread: &'a str,
    pub run: &'a str,
    /// The run at the top of the trace: the run itself, or the one that all of this is done for.
    pub root: &'a str,
    /// The run that it works for.
    pub parent: Option<&'a str>,
}

impl SpanOwner<'_> {
    fn hash(&self, context: &str, name: &str) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        for part in [self.tenant, self.thread, name] {
            hasher.update(&(part.len() as u64).to_be_bytes()).update(part.as_bytes());
        }
        hasher.finalize()
    }

    fn trace(&self) -> String {
        self.hash("weft 2026-11 trace of a run", self.root).to_hex()[..32].to_owned()
    }

    fn span_of(&self, run: &str) -> String {
        self.hash("weft 2026-11 span of a run", run).to_hex()[..16].to_owned()
    }

    fn span_of_call(&self, call: &str) -> String {
        self.hash("weft 2026-11 span of a call", &format!("{}/{call}", self.run)).to_hex()[..16].to_owned()
    }
}

/// The span of a run, of its first and last event.
pub fn put_run(out: &mut String, owner: &SpanOwner<'_>, begun: &str, ended: &str) {
    let (Some(begun), Some(ended)) = (StoredFrame::parse(begun), StoredFrame::parse(ended)) else { return };
    let (input, output) = (begun.fields(), ended.fields());
    let agent = input.string("agent").unwrap_or_default();
    let mut attributes = common(owner, "invoke_agent");
    attributes.push(text("gen_ai.agent.name", &agent));
    attributes.push(text("weft.run", owner.run));
    attributes.push(text("enduser.id", &begun.from));
    for (name, value) in [("input", input.text("input")), ("output", output.text("output"))] {
        attributes.extend(value.map(|value| text(&format!("weft.{name}"), &value)));
    }
    let usage = output.raw("usage").and_then(|usage| serde_json::from_str::<Map<String, Value>>(usage.get()).ok());
    for name in ["input_tokens", "output_tokens"] {
        let tokens = usage.as_ref().and_then(|usage| usage.get(name)).and_then(Value::as_u64);
        // OTLP has integers of 64 bits as text.
        attributes.extend(
            tokens.map(|n| json!({"key": format!("gen_ai.usage.{name}"), "value": {"intValue": n.to_string()}})),
        );
    }
    let status = match &*ended.kind {
        AGENT_FAILED => {
            let code = output.string("code").unwrap_or_else(|| "failed".to_owned());
            attributes.push(text("error.type", &code));
            json!({"code": ERROR, "message": output.string("message").unwrap_or_default()})
        }
        AGENT_CANCELLED => {
            attributes.push(text("error.type", "cancelled"));
            json!({"code": ERROR, "message": output.string("reason").unwrap_or_default()})
        }
        _ => json!({}),
    };
    let mut span = span(owner, owner.span_of(owner.run), &format!("invoke_agent {agent}"), &begun, &ended);
    if let Some(parent) = owner.parent {
        span["parentSpanId"] = owner.span_of(parent).into();
    }
    span["attributes"] = attributes.into();
    span["status"] = status;
    put(out, span);
}

/// The span of a call, of the events that begin and complete it.
pub fn put_call(out: &mut String, owner: &SpanOwner<'_>, call: &str, begun: &str, done: &str) {
    let (Some(begun), Some(done)) = (StoredFrame::parse(begun), StoredFrame::parse(done)) else { return };
    let (asked, came) = (begun.fields(), done.fields());
    let tool = asked.string("tool").unwrap_or_default();
    let mut attributes = common(owner, "execute_tool");
    attributes.push(text("gen_ai.tool.name", &tool));
    attributes.push(text("gen_ai.tool.type", "function"));
    attributes.push(text("gen_ai.tool.call.id", call));
    let contents = [("arguments", asked.text("arguments")), ("result", came.text("result"))];
    for (name, value) in contents {
        attributes.extend(value.map(|value| text(&format!("gen_ai.tool.call.{name}"), &value)));
    }
    let status = match came.text("error") {
        Some(error) => {
            // The kind of an error that is no word of a list.
            attributes.push(text("error.type", "_OTHER"));
            json!({"code": ERROR, "message": error})
        }
        None => json!({}),
    };
    let mut span = span(owner, owner.span_of_call(call), &format!("execute_tool {tool}"), &begun, &done);
    span["parentSpanId"] = owner.span_of(owner.run).into();
    span["attributes"] = attributes.into();
    span["status"] = status;
    put(out, span);
}

fn common(owner: &SpanOwner<'_>, operation: &str) -> Vec<Value> {
    vec![text("gen_ai.operation.name", operation), text("gen_ai.conversation.id", owner.thread)]
}

fn text(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": value}})
}

fn span(owner: &SpanOwner<'_>, id: String, name: &str, begun: &StoredFrame<'_>, ended: &StoredFrame<'_>) -> Value {
    let nanos = |at: &str| (u128::from(clock::parse_rfc3339(at).unwrap_or_default()) * 1_000_000).to_string();
    json!({
        "traceId": owner.trace(),
        "spanId": id,
        "name": name.trim_end(),
        "kind": INTERNAL,
        "startTimeUnixNano": nanos(&begun.at),
        "endTimeUnixNano": nanos(&ended.at),
    })
}

fn put(out: &mut String, span: Value) {
    let scope = json!({"name": "weft", "version": super::VERSION.to_string()});
    let spans = json!({"scope": scope, "spans": [span], "schemaUrl": SCHEMA_URL});
    let resource = json!({"attributes": [text("service.name", "weft")]});
    let line = json!({"resourceSpans": [{"resource": resource, "scopeSpans": [spans], "schemaUrl": SCHEMA_URL}]});
    out.push_str(&line.to_string());
    out.push('\n');
}
