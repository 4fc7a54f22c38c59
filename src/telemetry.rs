//! Every metric Weft has, in one list, and the recorder that `/metrics` is rendered from. No label names a tenant, a user or
//! a thread.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::protocol::dead_letters::REASONS;
use crate::protocol::work::{Overflow, Wait};

/// Buckets of durations, in seconds: 50 µs to 10 s.
const SECONDS: &[f64] = &[
    0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_6, 0.000_8, 0.001, 0.001_5, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 5.0, 10.0,
];
/// Buckets of batch sizes, in records.
const RECORDS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0, 5_000.0];

enum Type {
    Counter,
    Gauge,
    Seconds,
    Records,
}

/// The catalogue: name, type, description.
const METRICS: &[(&str, Type, &str)] = &[
    ("weft_connections", Type::Gauge, "Open WebSocket sessions"),
    ("weft_connections_total", Type::Counter, "WebSocket sessions since the start"),
    ("weft_connections_refused_total", Type::Counter, "Connections refused, by reason"),
    ("weft_closes_total", Type::Counter, "WebSocket sessions ended, by close code"),
    ("weft_commands_total", Type::Counter, "Commands, by type and outcome"),
    ("weft_http_requests_total", Type::Counter, "HTTP requests, by route and status"),
    (
        "weft_append_seconds",
        Type::Seconds,
        "From appending a record to the log until it was durable; on the embedded log the record of each batch that waited longest",
    ),
    ("weft_append_bytes_total", Type::Counter, "Bytes of keys and values appended to the log"),
    ("weft_append_batch_records", Type::Records, "Records the embedded log made durable at once"),
    ("weft_append_errors_total", Type::Counter, "Records the log did not accept, by outcome"),
    ("weft_log_damaged", Type::Gauge, "1 once damage was found in the embedded log"),
    (
        "weft_log_mended_total",
        Type::Counter,
        "Damaged write-ahead files whose rows were still in memory and were written anew",
    ),
    ("weft_log_reopened_total", Type::Counter, "Times the embedded log was opened again after its disk had failed"),
    ("weft_log_scrubbed_bytes_total", Type::Counter, "Bytes of the embedded log read to find damage"),
    (
        "weft_projections_damaged_total",
        Type::Counter,
        "Times the projections were damaged, so that they were set aside and made anew",
    ),
    ("weft_project_seconds", Type::Seconds, "Judging and committing one batch"),
    ("weft_project_batch_records", Type::Records, "Records projected at once"),
    ("weft_project_events_total", Type::Counter, "Events that got their seq"),
    ("weft_project_refused_total", Type::Counter, "Records refused by the projector, by code"),
    ("weft_publish_seconds", Type::Seconds, "From reading a publish from its socket until its answer was ready"),
    ("weft_lag_records", Type::Gauge, "Records in the log that are not projected yet; NaN while unknown"),
    (
        "weft_lag_seconds",
        Type::Gauge,
        "Age of the newest projected record while there are newer ones in the log; NaN while unknown",
    ),
    ("weft_projector_halted", Type::Gauge, "1 once the projector has stopped for good, by reason"),
    ("weft_log_problem", Type::Gauge, "1 while the log cannot be relied on to take and keep records"),
    ("weft_log_warnings", Type::Gauge, "What of the log somebody should see to"),
    ("weft_foreign_records_total", Type::Counter, "Foreign records in the log: such as Weft did not write"),
    (
        "weft_poisoned_records_total",
        Type::Counter,
        "Records that the projector panicked at: each is a bug, and a dead letter",
    ),
    ("weft_checkpoints_total", Type::Counter, "Checkpoints of partitions, by what became of them"),
    ("weft_dead_letters_total", Type::Counter, "Dead letters read from the log, by reason"),
    ("weft_deliveries_total", Type::Counter, "Event frames written to sockets"),
    ("weft_outbox_bytes", Type::Gauge, "Bytes of events waiting for sockets, all sessions"),
    ("weft_redeliveries_total", Type::Counter, "Deliveries begun again, since the oldest event was not acknowledged"),
    ("weft_runs", Type::Gauge, "Runs that have not ended, by state"),
    ("weft_pieces_received_total", Type::Counter, "Deltas (pieces of messages) that agents published over WebSocket"),
    ("weft_pieces_appended_total", Type::Counter, "Records that these deltas became"),
    ("weft_signals_total", Type::Counter, "Signals delivered to sessions"),
    ("weft_streams", Type::Gauge, "Open Server-Sent Events streams"),
    ("weft_rate_limited_total", Type::Counter, "Commands, signals and requests over a rate limit"),
    ("weft_lagged_total", Type::Counter, "Times a subscription lagged and went on from the store"),
    ("weft_replayed_events_total", Type::Counter, "Events read from the store for subscriptions"),
    ("weft_pending_publishes", Type::Gauge, "Publishes waiting for their answer"),
    ("weft_memory_budget_bytes", Type::Gauge, "Memory that a part may hold, by part"),
    ("weft_memory_used_bytes", Type::Gauge, "Memory that a part holds, by part"),
    ("weft_memory_waiting", Type::Gauge, "Requests and reads that wait for memory, by part"),
    ("weft_memory_refused_total", Type::Counter, "Requests and reads that got no memory, by part"),
    ("weft_work_given_total", Type::Counter, "Events of groups that this node gave to workers"),
    ("weft_work_wait_ms_total", Type::Counter, "Milliseconds that these had waited, by what for"),
    ("weft_work_settled_total", Type::Counter, "Leases that ended, by outcome"),
    ("weft_work_conflicts_total", Type::Counter, "Leases that another node was given first"),
    ("weft_search_seconds", Type::Seconds, "Searches, from their turn to their hits"),
    (
        "weft_search_partial_total",
        Type::Counter,
        "Searches that were broken off, since they had done as much work as one may",
    ),
    ("weft_search_indexed_total", Type::Counter, "Events added to the index of search"),
    ("weft_search_commit_seconds", Type::Seconds, "Commits of the index of search"),
    ("weft_search_waiting", Type::Gauge, "Events that search has in memory and not in its index yet"),
    (
        "weft_search_lag_seconds",
        Type::Gauge,
        "Age of the oldest event that is not found yet, while the index of search catches up; 0 once all are",
    ),
    ("weft_search_segments", Type::Gauge, "Segments of the index of search"),
    (
        "weft_search_failures_total",
        Type::Counter,
        "Times the index of search could not be written and was opened again",
    ),
    ("weft_work_waiting", Type::Gauge, "Events that wait for groups and nobody works on"),
    ("weft_work_overflowed_total", Type::Counter, "Events that full groups had no room for, by what became of them"),
    ("weft_groups_overflowing", Type::Gauge, "Groups for which as many events wait as their limit says, or more"),
    (
        "weft_level_waits_total",
        Type::Counter,
        "Answers that waited until this node had all that the log had, by outcome",
    ),
    ("weft_disk_free_bytes", Type::Gauge, "Bytes that can still be written to the disk of --data; NaN while unknown"),
    ("weft_outbound_calls_total", Type::Counter, "Calls of other services, by service and outcome"),
    ("weft_outbound_retries_total", Type::Counter, "Attempts at such calls beyond the first, by service"),
    ("weft_outbound_seconds", Type::Seconds, "From asking for such a call until its outcome, by service"),
    (
        "weft_outbound_breaker",
        Type::Gauge,
        "How a service's circuit breaker is, by service and host: 0 closed, 1 half-open, 2 open",
    ),
    (
        "weft_outbound_instances",
        Type::Gauge,
        "Instances of a service, by service, host and state: in, or out while their circuit breaker is not closed",
    ),
    ("weft_unknown_outcomes_total", Type::Counter, "Publishes answered with outcome unknown"),
    ("weft_panics_total", Type::Counter, "Panics: each is a bug"),
];

/// Installs the recorder, once a process. Without it (in tools) every metric is a no-op.
pub fn install() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(build).clone()
}

fn build() -> PrometheusHandle {
    let mut builder = PrometheusBuilder::new();
    for (name, kind, _) in METRICS {
        let buckets = match kind {
            Type::Seconds => SECONDS,
            Type::Records => RECORDS,
            Type::Counter | Type::Gauge => continue,
        };
        // Fails only for an empty list of buckets.
        builder = builder
            .set_buckets_for_metric(Matcher::Full((*name).into()), buckets)
            .expect("the buckets above are not empty");
    }
    // Fails only when the process already has a recorder, which `install` rules out.
    let handle = builder.install_recorder().expect("the recorder is installed once");
    for (name, kind, description) in METRICS {
        match kind {
            Type::Counter => describe_counter!(*name, Unit::Count, *description),
            Type::Gauge => describe_gauge!(*name, *description),
            Type::Seconds => describe_histogram!(*name, Unit::Seconds, *description),
            Type::Records => describe_histogram!(*name, Unit::Count, *description),
        }
    }
    metrics_process::Collector::default().describe();
    // A dashboard computes their ratio, so both have to be there before the first delta.
    [deltas_received(), deltas_appended()].iter().for_each(|counter| counter.increment(0));
    handle
}

/// Drains the recorder's histograms every few seconds, which grow otherwise.
pub async fn upkeep(handle: PrometheusHandle) {
    let mut every = tokio::time::interval(Duration::from_secs(5));
    loop {
        every.tick().await;
        handle.run_upkeep();
    }
}

/// The Prometheus text, with the process's own figures of this moment.
pub fn render(handle: &PrometheusHandle) -> String {
    metrics_process::Collector::default().collect();
    handle.render()
}

/// The names in the catalogue, for the check that dashboards and docs use no others.
pub fn names() -> impl Iterator<Item = &'static str> {
    METRICS.iter().map(|(name, _, _)| *name)
}

pub fn connections() -> Gauge {
    gauge!("weft_connections")
}
pub fn connections_total() -> Counter {
    counter!("weft_connections_total")
}
pub fn refused(reason: &'static str) -> Counter {
    counter!("weft_connections_refused_total", "reason" => reason)
}
pub fn closed(code: u16) -> Counter {
    counter!("weft_closes_total", "code" => code.to_string())
}
pub fn commands(name: &'static str, outcome: &'static str) -> Counter {
    counter!("weft_commands_total", "type" => name, "outcome" => outcome)
}
pub fn http_requests(route: &'static str, status: u16) -> Counter {
    counter!("weft_http_requests_total", "route" => route, "status" => status.to_string())
}
pub fn append_seconds() -> Histogram {
    histogram!("weft_append_seconds")
}
pub fn append_bytes() -> Counter {
    counter!("weft_append_bytes_total")
}
pub fn append_batch_records() -> Histogram {
    histogram!("weft_append_batch_records")
}
pub fn append_errors(outcome: &'static str) -> Counter {
    counter!("weft_append_errors_total", "outcome" => outcome)
}
pub fn log_damaged() -> Gauge {
    gauge!("weft_log_damaged")
}
pub fn log_mended() -> Counter {
    counter!("weft_log_mended_total")
}
pub fn log_reopened() -> Counter {
    counter!("weft_log_reopened_total")
}
pub fn log_scrubbed_bytes() -> Counter {
    counter!("weft_log_scrubbed_bytes_total")
}
pub fn projections_damaged() -> Counter {
    counter!("weft_projections_damaged_total")
}
pub fn project_seconds() -> Histogram {
    histogram!("weft_project_seconds")
}
pub fn project_batch_records() -> Histogram {
    histogram!("weft_project_batch_records")
}
pub fn project_events() -> Counter {
    counter!("weft_project_events_total")
}
pub fn project_refused(code: &'static str) -> Counter {
    counter!("weft_project_refused_total", "code" => code)
}
pub fn publish_seconds() -> Histogram {
    histogram!("weft_publish_seconds")
}
pub fn lag_records() -> Gauge {
    gauge!("weft_lag_records")
}
pub fn lag_seconds() -> Gauge {
    gauge!("weft_lag_seconds")
}
pub fn projector_halted(reason: &'static str) -> Gauge {
    gauge!("weft_projector_halted", "reason" => reason)
}
pub fn log_problem() -> Gauge {
    gauge!("weft_log_problem")
}
pub fn log_warnings() -> Gauge {
    gauge!("weft_log_warnings")
}
pub fn foreign_records() -> Counter {
    counter!("weft_foreign_records_total")
}
pub fn poisoned_records() -> Counter {
    counter!("weft_poisoned_records_total")
}
pub fn checkpoints(outcome: &'static str) -> Counter {
    counter!("weft_checkpoints_total", "outcome" => outcome)
}
pub fn dead_letters(reason: &str) -> Counter {
    // The reasons of our own records; any other that a record names counts as "other".
    let own = REASONS.into_iter().find(|own| *own == reason);
    counter!("weft_dead_letters_total", "reason" => own.unwrap_or("other"))
}
pub fn redeliveries() -> Counter {
    counter!("weft_redeliveries_total")
}
pub fn runs(state: &'static str) -> Gauge {
    gauge!("weft_runs", "state" => state)
}
pub fn deltas_received() -> Counter {
    counter!("weft_pieces_received_total")
}
pub fn deltas_appended() -> Counter {
    counter!("weft_pieces_appended_total")
}
pub fn signals() -> Counter {
    counter!("weft_signals_total")
}
pub fn streams() -> Gauge {
    gauge!("weft_streams")
}
pub fn rate_limited() -> Counter {
    counter!("weft_rate_limited_total")
}
pub fn deliveries() -> Counter {
    counter!("weft_deliveries_total")
}
pub fn outbox_bytes() -> Gauge {
    gauge!("weft_outbox_bytes")
}
pub fn lagged() -> Counter {
    counter!("weft_lagged_total")
}
pub fn replayed_events() -> Counter {
    counter!("weft_replayed_events_total")
}
pub fn pending_publishes() -> Gauge {
    gauge!("weft_pending_publishes")
}
pub fn memory_budget(part: &'static str) -> Gauge {
    gauge!("weft_memory_budget_bytes", "part" => part)
}
pub fn memory_used(part: &'static str) -> Gauge {
    gauge!("weft_memory_used_bytes", "part" => part)
}
pub fn memory_waiting(part: &'static str) -> Gauge {
    gauge!("weft_memory_waiting", "part" => part)
}
pub fn memory_refused(part: &'static str) -> Counter {
    counter!("weft_memory_refused_total", "part" => part)
}
/// An event was given to a worker, after this wait.
pub fn work_given(wait: &Wait) {
    counter!("weft_work_given_total").increment(1);
    let Wait { busy_ms, no_worker_ms, fairness_ms, backoff_ms, paused_ms, log_ms } = *wait;
    for (reason, ms) in [
        ("busy", busy_ms),
        ("no_worker", no_worker_ms),
        ("fairness", fairness_ms),
        ("backoff", backoff_ms),
        ("paused", paused_ms),
        ("log", log_ms),
    ] {
        counter!("weft_work_wait_ms_total", "reason" => reason).increment(ms);
    }
}
pub fn work_settled(outcome: &'static str) -> Counter {
    counter!("weft_work_settled_total", "outcome" => outcome)
}
pub fn work_conflicts() -> Counter {
    counter!("weft_work_conflicts_total")
}
pub fn search_seconds() -> Histogram {
    histogram!("weft_search_seconds")
}
pub fn search_partial() -> Counter {
    counter!("weft_search_partial_total")
}
pub fn search_indexed() -> Counter {
    counter!("weft_search_indexed_total")
}
pub fn search_commit_seconds() -> Histogram {
    histogram!("weft_search_commit_seconds")
}
pub fn search_waiting() -> Gauge {
    gauge!("weft_search_waiting")
}
pub fn search_lag_seconds() -> Gauge {
    gauge!("weft_search_lag_seconds")
}
pub fn search_segments() -> Gauge {
    gauge!("weft_search_segments")
}
pub fn search_failures() -> Counter {
    counter!("weft_search_failures_total")
}
pub fn work_waiting() -> Gauge {
    gauge!("weft_work_waiting")
}
pub fn work_overflowed(how: Overflow) -> Counter {
    let how = match how {
        Overflow::Accept => "accept",
        Overflow::Reject => "reject",
        Overflow::DeadLetter => "dead_letter",
    };
    counter!("weft_work_overflowed_total", "overflow" => how)
}
pub fn groups_overflowing() -> Gauge {
    gauge!("weft_groups_overflowing")
}
pub fn level_waits(outcome: &'static str) -> Counter {
    counter!("weft_level_waits_total", "outcome" => outcome)
}
pub fn disk_free_bytes() -> Gauge {
    gauge!("weft_disk_free_bytes")
}
pub fn outbound_calls(service: &'static str, outcome: &'static str) -> Counter {
    counter!("weft_outbound_calls_total", "service" => service, "outcome" => outcome)
}
pub fn outbound_retries(service: &'static str) -> Counter {
    counter!("weft_outbound_retries_total", "service" => service)
}
pub fn outbound_seconds(service: &'static str) -> Histogram {
    histogram!("weft_outbound_seconds", "service" => service)
}
pub fn outbound_breaker(service: &'static str, host: &str) -> Gauge {
    gauge!("weft_outbound_breaker", "service" => service, "host" => host.to_owned())
}
pub fn outbound_instances(service: &'static str, host: &str, state: &'static str) -> Gauge {
    gauge!("weft_outbound_instances", "service" => service, "host" => host.to_owned(), "state" => state)
}
pub fn unknown_outcomes() -> Counter {
    counter!("weft_unknown_outcomes_total")
}
pub fn panics() -> Counter {
    counter!("weft_panics_total")
}
