//! What grows: the cost of a publish, of a subscribe and of a page of threads, and of a start, by how much the server holds.
//!
//! It starts servers of its own, one after the other, each with data of its own: with more and more threads, partitions, idle
//! connections and events. All but one of these are as small as they get. A cost is what the server's process took of the
//! processor for one operation, which a noisy disk or a busy machine changes little, unlike the time that passed.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};

use crate::publisher::{Frame, Publisher};
use crate::report::Figure;
use crate::socket::{Socket, text_frame};
use crate::target::{Target, TargetArgs, open_files, progress};
use weft::cli::common::Failure;

/// Unanswered publishes while data is made.
const WINDOW: u64 = 1_000;
const PAYLOAD: usize = 64;
/// How many threads a user has at the most.
const OF_A_USER: usize = 1_000;
/// Files that this process needs beside idle connections.
const OTHER_FILES: usize = 100;
/// How often the kernel counts what a process took, a second.
const TICKS: f64 = 100.0;
/// What servers may hold in memory, and how much more for an idle connection: a fourth of it is for connections.
const MEMORY_MIB: u64 = 1_024;
const CONNECTION_KIB: u64 = 100;
const STARTS_WITHIN: Duration = Duration::from_secs(600);
const LOOK_EVERY: Duration = Duration::from_millis(5);
const SECRET: &str = "what only the servers of this bench are asked with";

#[derive(Debug, Clone, clap::Args)]
pub struct GrowArgs {
    /// The server's program; that beside this one unless given.
    #[arg(long)]
    pub weft: Option<PathBuf>,
    /// Where the servers' data is, in folders of their own; removed afterwards.
    #[arg(long, default_value = "./grow-data")]
    pub data: PathBuf,
    /// Threads, 1,000 of a user.
    #[arg(long, value_delimiter = ',', default_value = "1,1000,20000")]
    pub threads: Vec<u64>,
    #[arg(long, value_delimiter = ',', default_value = "16,1024")]
    pub partitions: Vec<u64>,
    /// Connections that are subscribed and silent; as many as there may be open files if those are fewer.
    #[arg(long, value_delimiter = ',', default_value = "0,2000")]
    pub connections: Vec<u64>,
    /// Events in one thread. After the last of them the server is started anew.
    #[arg(long, value_delimiter = ',', default_value = "1000,100000")]
    pub events: Vec<u64>,
    /// Publishes that are measured; of subscribes and pages a tenth of that.
    #[arg(long, default_value_t = 20_000)]
    pub operations: u64,
}

/// How much a server holds.
#[derive(Debug, Clone, Copy)]
struct Size {
    threads: u64,
    partitions: u64,
    connections: u64,
    events: u64,
}

const SMALLEST: Size = Size { threads: 1, partitions: 16, connections: 0, events: 0 };
const COSTS: [(&str, &str); 5] =
    [("publish", "µs"), ("subscribe", "µs"), ("page", "µs"), ("start", "ms"), ("start, on the clock", "ms")];

/// What grows, its sizes, and a server of such a size.
type Kind<'a> = (&'static str, &'a [u64], fn(u64) -> Size);

/// What a server of one size took.
pub struct Row {
    what: &'static str,
    size: u64,
    costs: [f64; COSTS.len()],
    /// The same at the smallest size of its kind.
    first: [f64; COSTS.len()],
}

pub async fn run(args: &GrowArgs) -> Result<Vec<Row>, Failure> {
    let mut rows: Vec<Row> = Vec::new();
    let kinds: [Kind<'_>; 4] = [
        ("threads", &args.threads, |threads| Size { threads: threads.max(1), ..SMALLEST }),
        ("partitions", &args.partitions, |partitions| Size { partitions, ..SMALLEST }),
        ("idle connections", &args.connections, |connections| Size { connections, ..SMALLEST }),
        ("events", &args.events, |events| Size { events, ..SMALLEST }),
    ];
    for (what, sizes, of) in kinds {
        let mut first = None;
        for wanted in sizes {
            let mut size = of(*wanted);
            size.connections = allowed(size.connections)?;
            let shown = if size.connections < of(*wanted).connections { size.connections } else { *wanted };
            progress(&format!("grow: {shown} {what}"));
            let costs = measure(args, size).await?;
            rows.push(Row { what, size: shown, costs, first: *first.get_or_insert(costs) });
        }
    }
    Ok(rows)
}

/// So many connections, or as many as this process may have; the server says its own limit when it refuses one.
fn allowed(connections: u64) -> Result<u64, Failure> {
    let files = open_files(connections as usize + OTHER_FILES)?.saturating_sub(OTHER_FILES) as u64;
    if files < connections {
        eprintln!(
            "weft-bench: {files} idle connections in place of {connections}: no more files may be open (ulimit -Hn)"
        );
    }
    Ok(connections.min(files))
}

async fn measure(args: &GrowArgs, size: Size) -> Result<[f64; COSTS.len()], Failure> {
    let folder = args.data.join(format!("grow-{}", std::process::id()));
    let measured = measure_in(args, size, &folder).await;
    // What cannot be removed is in a folder that says whose it is.
    drop(std::fs::remove_dir_all(&folder));
    // There only if nothing else was in it.
    drop(std::fs::remove_dir(&args.data));
    measured
}

async fn measure_in(args: &GrowArgs, size: Size, folder: &Path) -> Result<[f64; COSTS.len()], Failure> {
    let server = Server::start(args, size, folder).await?;
    let owner = server.target.name("owner", 0);
    let threads: Vec<String> = (0..size.threads as usize).map(|n| server.target.name("t", n)).collect();
    for (number, threads) in threads.chunks(OF_A_USER).enumerate() {
        let owner = server.target.name("owner", number);
        fill(&server.target, &owner, threads.len() as u64, |n| &threads[n as usize]).await?;
    }
    fill(&server.target, &owner, size.events, |_| &threads[0]).await?;
    let idle = idle(&server.target, size.connections as usize).await?;

    let (operations, few) = (args.operations.max(1), args.operations.div_ceil(10).max(1));
    let before = server.cpu()?;
    let frame = Frame::publish(&threads[0], PAYLOAD, false);
    Publisher::open(&server.target, &owner, frame, 64).await?.run(|sent| sent < operations, |_, _| ()).await?;
    let published = server.cpu()?;
    for n in 0..few {
        let number = (n * size.threads / few) as usize;
        let owner = server.target.name("owner", number / OF_A_USER);
        drop(server.target.socket(&owner).await?.subscribed(&threads[number]).await?);
    }
    let subscribed = server.cpu()?;
    let mut http = server.target.http(&owner).await?;
    for _ in 0..few {
        let page = http.get("/v1/threads?limit=20").await?;
        let found = page["threads"].as_array().map_or(0, Vec::len) as u64;
        if found != size.threads.min(20) {
            return Err(format!("a page of {found} of {} threads", size.threads).into());
        }
    }
    let paged = server.cpu()?;
    drop((http, idle));
    server.stop()?;

    let begin = Instant::now();
    let again = Server::start(args, size, folder).await?;
    let clock = begin.elapsed().as_secs_f64();
    let start = again.cpu()?;
    again.stop()?;
    let each = |from: f64, to: f64, count: u64| (to - from) / count as f64 * 1e6;
    Ok([
        each(before, published, operations),
        each(published, subscribed, few),
        each(subscribed, paged, few),
        start * 1e3,
        clock * 1e3,
    ])
}

/// Publishes so many events, each to the thread that `thread` names.
async fn fill<'a>(target: &Target, owner: &str, count: u64, thread: impl Fn(u64) -> &'a String) -> Result<(), Failure> {
    let mut socket = target.socket(owner).await?;
    let (mut sent, mut answered) = (0, 0);
    while answered < count {
        while sent < count && sent - answered < WINDOW {
            let thread = thread(sent);
            let text = format!(
                r#"{{"type":"publish","id":{sent},"thread":"{thread}","kind":"user_message","data":{{"content":"x"}}}}"#
            );
            socket.queue(&text_frame(text.as_bytes()));
            sent += 1;
        }
        socket
            .exchange(|reply| {
                answered += 1;
                reply.published().map(drop)
            })
            .await?;
    }
    Ok(())
}

/// Connections that are subscribed to a thread of their own, in which nothing happens.
async fn idle(target: &Target, count: usize) -> Result<Vec<Socket>, Failure> {
    let connect = async |number: usize| {
        let user = target.name("idle", number);
        fill(target, &user, 1, |_| &user).await?;
        Ok(target.socket(&user).await?.subscribed(&user).await?.0)
    };
    target.many(count, connect).await
}

/// A server of this bench's own. Dropped, it ends.
struct Server {
    child: Child,
    target: Target,
}

impl Server {
    /// Returns once it is ready.
    async fn start(args: &GrowArgs, size: Size, folder: &Path) -> Result<Server, Failure> {
        let weft = match &args.weft {
            Some(weft) => weft.clone(),
            None => std::env::current_exe()?.with_file_name("weft"),
        };
        let mut command = Command::new(&weft);
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--log", "embedded", "--jwt-secret", SECRET])
            .args(["--rate-user", "0", "--rate-agent", "0", "--partitions", &size.partitions.to_string(), "--data"])
            .arg(folder)
            .args(["--memory", &format!("{}MiB", MEMORY_MIB + size.connections * CONNECTION_KIB / 1024)])
            .env("WEFT_LOG_LEVEL", "error")
            .stdout(Stdio::piped());
        let child = command.spawn().map_err(|error| format!("{}: {error}", weft.display()))?;
        let mut server = Server { child, target: Target::new(&TargetArgs::of("http://127.0.0.1:0", SECRET))? };
        let stdout = server.child.stdout.take().ok_or("the server has no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let url = line.split_whitespace().find(|word| word.starts_with("http://"));
        let url = url.ok_or_else(|| format!("the server did not start: {line:?}"))?;
        server.target = Target::new(&TargetArgs::of(url, SECRET))?;

        let until = Instant::now() + STARTS_WITHIN;
        let mut http = server.target.http("observer").await?;
        while let Err(error) = http.get("/v1/threads").await {
            if Instant::now() >= until {
                return Err(error.into());
            }
            tokio::time::sleep(LOOK_EVERY).await;
            http = server.target.http("observer").await?;
        }
        Ok(server)
    }

    /// What its process has taken of the processor so far, in seconds.
    fn cpu(&self) -> Result<f64, Failure> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // After the program's name, which may hold spaces, times are the 12th and the 13th field.
        let fields = stat.rsplit_once(')').map(|(_, rest)| rest).ok_or("the process has no name")?;
        let mut times = fields.split_whitespace().skip(11).map(str::parse::<f64>);
        match (times.next(), times.next()) {
            (Some(user), Some(system)) => Ok((user? + system?) / TICKS),
            _ => Err(format!("no times in {stat:?}").into()),
        }
    }

    /// Asks it to end, and waits for that.
    fn stop(mut self) -> Result<(), Failure> {
        let asked = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status()?;
        let ended = self.child.wait()?;
        if asked.success() && ended.success() { Ok(()) } else { Err(format!("the server ended with {ended}").into()) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // After an error of the bench; one that has ended is not there any more.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The figures by their names, each with its ratio to the smallest size, for programs.
pub fn figures(rows: &[Row]) -> Vec<Figure> {
    let each = rows.iter().flat_map(|row| {
        COSTS.iter().zip(row.costs.iter().zip(row.first)).flat_map(|((cost, unit), (value, first))| {
            let name = format!("{cost}, {} {}", row.size, row.what);
            let ratio = Figure::less(&format!("{name} / fewest"), value / first, "times");
            let has_ratio = first > 0.0;
            [Some(Figure::less(&name, *value, unit)), has_ratio.then_some(ratio)].into_iter().flatten()
        })
    });
    each.collect()
}

/// A line for each size: each cost, and how many times that of the smallest size it is.
pub fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let costs = COSTS.iter().flat_map(|(cost, unit)| [format!("{cost}, {unit}"), "×".to_owned()]);
    table.set_header([String::new()].into_iter().chain(costs));
    for row in rows {
        let cells = row.costs.iter().zip(row.first).flat_map(|(value, first)| {
            let ratio = if first > 0.0 { format!("{:.2}", value / first) } else { String::new() };
            [format!("{value:.1}"), ratio]
        });
        table.add_row([format!("{} {}", row.size, row.what)].into_iter().chain(cells));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cost_stands_beside_how_many_times_that_of_the_smallest_size_it_is() {
        let row = |size, costs| Row { what: "threads", size, costs, first: [10.0, 0.0, 4.0, 5.0, 5.0] };
        let rows = [row(1, [10.0, 0.0, 4.0, 5.0, 5.0]), row(1_000, [15.0, 3.0, 4.0, 10.0, 5.0])];
        let figures = figures(&rows);
        let value = |name: &str| figures.iter().find(|figure| figure.name == name).map(|figure| figure.value);
        assert_eq!(value("publish, 1000 threads"), Some(15.0));
        assert_eq!(value("publish, 1000 threads / fewest"), Some(1.5));
        assert_eq!(value("subscribe, 1000 threads / fewest"), None, "too small to be compared with");
        let table = table(&rows);
        assert!(table.contains("1000 threads") && table.contains("15.0") && table.contains("1.50"), "{table}");
    }
}
