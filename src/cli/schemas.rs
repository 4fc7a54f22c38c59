//! `weft schemas`: writes the contract as machines read it: JSON Schemas, one file each, and the documents made of them. Or
//! compares it with one that was released.

use std::path::{Path, PathBuf};

use super::common::Failure;
use crate::edge::contract;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder to write to
    #[arg(long, default_value = "schemas")]
    out: PathBuf,

    /// Write nothing: name what breaks the contract in this folder, and fail if anything does
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    check: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    if let Some(released) = &args.check {
        return check(released);
    }
    std::fs::create_dir_all(&args.out)?;
    for (name, text) in contract::files() {
        std::fs::write(args.out.join(name), text)?;
    }
    Ok(())
}

fn check(released: &Path) -> Result<(), Failure> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(released).map_err(|error| format!("{}: {error}", released.display()))? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json")) else { continue };
        let text = std::fs::read_to_string(&path)?;
        let schema = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))?;
        files.push((name.to_owned(), schema));
    }
    if files.is_empty() {
        return Err(format!("{} holds no schemas", released.display()).into());
    }
    files.sort_by(|(a, _), (b, _)| a.cmp(b));

    let breaks = contract::breaks(&files);
    for why in &breaks {
        println!("{why}");
    }
    match breaks.len() {
        0 => Ok(()),
        1 => Err("one thing breaks what was released".into()),
        n => Err(format!("{n} things break what was released").into()),
    }
}
