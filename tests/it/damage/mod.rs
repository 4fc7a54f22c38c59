//! Files that were changed, cut or lost, and disks that fail: what was answered is there, or the server says what is wrong and
//! touches nothing.

mod disk;
mod projections;
mod tables;
mod verify;
mod write_ahead;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{LogKind, Server, Socket, accepted, publish, weft};

const UNLIMITED: &[&str] = &["--rate-user", "0", "--rate-agent", "0"];

/// Publishes events with the numbers of a range, and returns when all are answered.
async fn publish_numbers(socket: &mut Socket, thread: &str, numbers: std::ops::Range<u64>) {
    let numbers: Vec<u64> = numbers.collect();
    for numbers in numbers.chunks(50) {
        let command = |n: &u64| {
            let mut command =
                publish(thread, "x.load", json!({"n": n, "text": "some text ".repeat(1 + (*n as usize) % 20)}));
            command["id"] = json!(n);
            command
        };
        socket.send(&Value::Array(numbers.iter().map(command).collect())).await;
        for _ in numbers {
            accepted(&socket.recv().await);
        }
    }
}

/// The numbers of a thread's events, in the order of their seqs.
async fn numbers(server: &Server, thread: &str) -> Vec<u64> {
    let mut reader = server.connect("ada").await;
    let head = reader.subscribe(thread, Some(0)).await["head"].as_u64().unwrap();
    reader.events(head as usize).await.iter().map(|event| event["data"]["n"].as_u64().unwrap()).collect()
}

/// Numbers in a thread of their own for each server of these tests.
fn expected(numbers: u64) -> Vec<u64> {
    (0..numbers).collect()
}

/// The files of a folder whose name is a number, with this ending, by number.
fn numbered(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == ending))
        .filter(|path| path.file_stem().unwrap().to_str().unwrap().parse::<u64>().is_ok())
        .collect();
    found.sort();
    found
}

/// The newest file of the write-ahead log of a server that was killed, and where what it holds ends.
fn write_ahead_file(data: &Path) -> (PathBuf, usize) {
    let path = numbered(&data.join("log"), "log").pop().unwrap();
    let bytes = fs::read(&path).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    (path, end)
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x20;
    fs::write(path, bytes).unwrap();
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// A server that is not started, with a copy of another one's data.
fn copy_of(server: &Server) -> Server {
    let other = Server::stopped_with(LogKind::embedded(), UNLIMITED);
    copy(server.data(), other.data());
    other
}

/// Runs a command on a data folder; gives its exit code, and what it prints as JSON.
fn run_json(command: &str, data: &Path, more: &[&str]) -> (Option<i32>, Value) {
    let output = weft().args([command, "--json", "--data"]).arg(data).args(more).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let said = || format!("{printed} {}", String::from_utf8_lossy(&output.stderr));
    (output.status.code(), serde_json::from_str(&printed).unwrap_or_else(|_| panic!("{}", said())))
}

/// What `weft doctor` finds wrong.
fn doctor(data: &Path) -> Vec<String> {
    let (code, found) = run_json("doctor", data, &[]);
    let wrong: Vec<String> = found["checks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|check| check["ok"] == false)
        .map(|check| format!("{}: {} ({})", check["name"], check["wrong"], check["mend"]))
        .collect();
    assert_eq!((code, &found["ok"]), if wrong.is_empty() { (Some(0), &json!(true)) } else { (Some(1), &json!(false)) });
    wrong
}

/// Salvages the log of a server that is down, and starts another one on what was saved; gives that and what was said.
fn salvage(server: &Server) -> (Server, Value) {
    let mut saved = Server::stopped_with(LogKind::embedded(), UNLIMITED);
    let (code, said) = run_json("salvage", server.data(), &["--out", saved.data().to_str().unwrap()]);
    assert_eq!(code, Some(0), "{said}");
    saved.up();
    (saved, said)
}
