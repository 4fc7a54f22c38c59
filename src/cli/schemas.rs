//! `weft schemas`: writes the contract as JSON Schemas, one file each.

use std::path::PathBuf;

use super::common::Failure;
use crate::protocol::schemas;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder to write to
    #[arg(long, default_value = "schemas")]
    out: PathBuf,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    std::fs::create_dir_all(&args.out)?;
    for (name, schema) in schemas::all() {
        std::fs::write(args.out.join(format!("{name}.json")), schemas::text(&schema))?;
    }
    Ok(())
}
