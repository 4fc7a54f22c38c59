//! `weft verify`: proves an export, without a server.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use serde_json::json;

use super::common::{Failure, Output};
use crate::views::export::verify::{self, Verified};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What `weft export` wrote.
    pub file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let name = args.file.display();
    let file = File::open(&args.file).map_err(|error| format!("{name}: {error}"))?;
    let verified = verify::verify(BufReader::with_capacity(1 << 20, file)).map_err(|flaw| format!("{name}: {flaw}"))?;
    let Verified { header, lines, threads, proved, partly, digest } = verified;
    let out = Output::new();
    if args.json {
        let found = json!({
            "lines": lines, "threads": threads, "proved": proved, "partly": partly, "blake3": digest, "export": header,
        });
        return out.line(found).map(drop);
    }
    out.line(format_args!("complete and unaltered: {lines} lines of {threads} threads of {}", header.tenant))?;
    out.line(format_args!("of the log {}; its digest is {digest}", header.epoch))?;
    let chains = match (proved, partly) {
        _ if !header.is_whole() => "it is a choice of events: no hash of a thread was made from it".to_owned(),
        (proved, 0) => format!("of all {proved} threads each event was held against the thread's hash"),
        (proved, partly) => format!(
            "of {proved} threads each event was held against the thread's hash, of {partly} those after the last one whose record \
             is not in the export; the others by the digest"
        ),
    };
    out.line(chains).map(drop)
}
