//! A real Kafka broker for tests: one for all of them, or one of their own to pause and kill.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, OnceLock};

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/kafka.sh")
}

/// The address of the broker that all tests share: `WEFT_TEST_BROKERS`, else one that lives as long as this process.
pub fn brokers() -> &'static str {
    static SHARED: OnceLock<(String, Option<Broker>)> = OnceLock::new();
    let (brokers, _) = SHARED.get_or_init(|| match std::env::var("WEFT_TEST_BROKERS") {
        Ok(brokers) => (brokers, None),
        Err(_) => {
            let broker = Broker::own();
            (broker.brokers(), Some(broker))
        }
    });
    brokers
}

/// A prefix for topics that no other test uses, on this or an earlier run against the same broker.
pub fn fresh_prefix() -> String {
    format!("test-{}.", weft::clock::event_id())
}

/// Runs one of Kafka's own tools and returns what it printed.
pub fn tool(class: &str, args: &[&str], input: &str) -> String {
    let mut tool = Command::new(script());
    tool.args(["tool", class]).args(args).env("WEFT_KAFKA_DIR", tools_dir());
    output(tool, input)
}

/// Where tools find their log settings when no broker of ours runs.
fn tools_dir() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| tempfile::tempdir().expect("a temporary folder")).path()
}

fn output(mut command: Command, input: &str) -> String {
    use std::io::Write;
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kafka.sh runs");
    // Dropped after writing, which is the end of the input.
    child.stdin.take().expect("stdin is piped").write_all(input.as_bytes()).expect("the tool reads its input");
    let output = child.wait_with_output().expect("kafka.sh ends");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?} failed\n{out}{err}");
    out.into_owned()
}

/// A broker with its own folder and port, gone when this is dropped or the process ends, however it ends.
pub struct Broker {
    dir: PathBuf,
    port: u16,
    /// Wants TLS and SASL.
    secured: bool,
    /// Holds the other end of the janitor's input.
    janitor: Mutex<Child>,
}

impl Broker {
    pub fn own() -> Broker {
        Broker::new(false)
    }

    /// One that speaks TLS and wants to know who it is: SCRAM-SHA-512, user `weft`, password `weft-secret`.
    pub fn secured() -> Broker {
        Broker::new(true)
    }

    fn new(secured: bool) -> Broker {
        let dir = tempfile::Builder::new().prefix("weft-kafka-").tempdir().expect("a temporary folder").keep();
        let port = free_ports();
        let mut janitor = Command::new("sh");
        janitor
            // Ends when our end of the pipe closes: at the latest with this process, even if that is killed.
            .args(["-c", r#"cat; pid=$(cat "$1/pid") && kill -KILL "$pid"; rm -rf "$1""#, "sh"])
            .arg(&dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        own_group(&mut janitor);
        let broker = Broker { dir, port, secured, janitor: Mutex::new(janitor.spawn().expect("sh runs")) };
        broker.start();
        broker
    }

    pub fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Of a secured broker: SASL without TLS.
    pub fn without_tls(&self) -> String {
        format!("127.0.0.1:{}", self.port + 2)
    }

    /// Of a secured broker: the file with the certificate of its authority, or of one that has signed nothing.
    pub fn authority(&self, right: bool) -> String {
        self.dir.join(if right { "tls/ca.pem" } else { "tls/other-ca.pem" }).display().to_string()
    }

    /// Starts it, or starts it again with its data.
    pub fn start(&self) {
        self.script("start");
    }

    /// Stops it the clean way.
    pub fn stop(&self) {
        self.script("stop");
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.signal("KILL");
    }

    /// SIGSTOP: connections stay open, and nothing answers.
    pub fn pause(&self) {
        self.signal("STOP");
    }

    pub fn resume(&self) {
        self.signal("CONT");
    }

    fn script(&self, what: &str) {
        let mut command = Command::new(script());
        command.arg(what).env("WEFT_KAFKA_DIR", &self.dir).env("WEFT_KAFKA_PORT", self.port.to_string());
        if self.secured {
            command.env("WEFT_KAFKA_SASL", "1");
        }
        own_group(&mut command);
        // Not through pipes: the broker inherits them, and they would stay open.
        let log = self.dir.join(format!("{what}.log"));
        let file = || std::fs::File::options().create(true).append(true).open(&log).expect("the folder is ours");
        let status = command.stdin(Stdio::null()).stdout(file()).stderr(file()).status().expect("kafka.sh runs");
        assert!(status.success(), "kafka.sh {what} failed\n{}", std::fs::read_to_string(&log).unwrap_or_default());
    }

    fn signal(&self, signal: &str) {
        let pid = std::fs::read_to_string(self.dir.join("pid")).expect("the broker has been started");
        let status = Command::new("kill").args([&format!("-{signal}"), pid.trim()]).status().expect("kill runs");
        assert!(status.success(), "the broker does not run");
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let janitor = self.janitor.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        drop(janitor.stdin.take());
        drop(janitor.wait());
    }
}

/// So that Ctrl-C on the tests reaches the broker only through its janitor.
fn own_group(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
}

/// A free port whose next two are free as well. Below those that the kernel gives to outgoing connections, so that it is
/// still free when the broker starts again.
fn free_ports() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let free = |port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    loop {
        // Another test process begins elsewhere.
        let step = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_add((std::process::id() % 3000) as u16);
        let port = 20_000 + (step % 3000) * 3;
        if free(port) && free(port + 1) && free(port + 2) {
            return port;
        }
    }
}
