//! A panic in what all depend on ends the process. No data leads to one, so these tests bring their own: a child process of
//! this very binary opens the real parts and hands one of them something that panics.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::json;
use weft::log::embedded::EmbeddedLog;
use weft::log::kafka::{ClientSettings, KafkaConfig, KafkaLog};
use weft::log::{Append, Log};
use weft::panics;
use weft::projector::{Projector, Pump, Status};

use crate::persistence::projector::{self, open_store, record};
use crate::support::{PATIENCE, kafka};

/// Where a child works, and against which brokers and topics, if any.
const FOLDER: &str = "WEFT_TEST_FOLDER";
const KAFKA: &str = "WEFT_TEST_KAFKA";

const SIGABRT: i32 = 6;

/// Runs one of the tests of [`child`] in a process of its own. It is aborted, after a word about the part that panicked.
fn aborted(child: &str, kafka: Option<String>, said: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--ignored", "--exact", "--nocapture", &format!("reliability::panics::child::{child}")])
        .env(FOLDER, folder.path())
        .envs(kafka.map(|kafka| (KAFKA, kafka)));
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.signal(), Some(SIGABRT), "{text}");
    assert!(text.contains("a panic, which is a bug: of the test's own"), "{text}");
    assert!(text.contains(said), "{text}");
}

#[test]
fn a_panic_in_the_embedded_log_s_writer_ends_the_process() {
    aborted("appends_to_the_embedded_log", None, "the log's writer has panicked");
}

#[test]
fn a_panic_in_kafka_s_producer_ends_the_process() {
    let place = format!("{} {}", kafka::brokers(), kafka::fresh_prefix());
    aborted("appends_to_kafka", Some(place), "a thread of the log has panicked");
}

#[test]
fn a_panic_in_the_projector_ends_the_process() {
    aborted("projects", None, "the projector has panicked");
}

#[test]
fn a_panic_in_a_task_that_all_depend_on_ends_the_process() {
    aborted("runs_a_vital_task", None, "the hub has panicked");
}

/// What children do. None of them comes back, and one that does has not ended the process.
mod child {
    use super::*;

    fn begin() -> String {
        tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
        panics::report();
        std::env::var(FOLDER).expect("a test above starts this one, in a process of its own")
    }

    /// Waits to be ended.
    fn end() {
        std::thread::sleep(PATIENCE);
    }

    /// Who appended panics over the answer, on the thread that gives it.
    fn append(log: &dyn Log) {
        let record = record(weft::clock::now_ms(), "t", "ada", "x.a", &json!(1), None);
        log.append(vec![Append { record, done: Box::new(|_| panic!("of the test's own")) }]);
        end();
    }

    fn embedded() -> EmbeddedLog {
        EmbeddedLog::open(&Path::new(&begin()).join("log"), 2).unwrap()
    }

    #[test]
    #[ignore = "ends its process; a test above starts it in one of its own"]
    fn appends_to_the_embedded_log() {
        append(&embedded());
    }

    #[test]
    #[ignore = "ends its process; a test above starts it in one of its own"]
    fn appends_to_kafka() {
        begin();
        let place = std::env::var(KAFKA).unwrap();
        let (brokers, prefix) = place.split_once(' ').unwrap();
        let config = KafkaConfig {
            brokers: brokers.to_owned(),
            partitions: 2,
            topic_prefix: prefix.to_owned(),
            group: format!("{prefix}node"),
            settings: ClientSettings::default(),
            memory: weft::memory::LogPlan::default(),
        };
        append(&KafkaLog::open(config).unwrap());
    }

    #[test]
    #[ignore = "ends its process; a test above starts it in one of its own"]
    fn projects() {
        let log = Arc::new(embedded());
        projector::append(&log, vec![record(1, "t", "ada", "x.a", &json!(1), None)]);
        let folder = std::env::var(FOLDER).unwrap();
        let (store, progress) = open_store(log.as_ref(), &Path::new(&folder).join("projections"));
        let pump = Pump {
            projector: Projector::new(store, log.as_ref(), progress),
            reader: log.reader(&vec![0; log.partitions() as usize]).unwrap(),
            log,
            threads: 1,
            status: Arc::new(Status::default()),
            stop: Arc::new(AtomicBool::new(false)),
            publish: Box::new(|_| panic!("of the test's own")),
        };
        pump.start().unwrap();
        end();
    }

    #[test]
    #[ignore = "ends its process; a test above starts it in one of its own"]
    fn runs_a_vital_task() {
        begin();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.spawn(panics::vital("the hub", async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            panic!("of the test's own")
        }));
        end();
    }
}
