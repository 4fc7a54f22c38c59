//! What the commands log to standard error, and in which form.

use std::io;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::common::has_colours;
use crate::config::ConfigError;

const VARIABLE: &str = "WEFT_LOG_LEVEL";
const DEFAULT: &str = "warn,weft=info";

/// Starts logging, as `WEFT_LOG_LEVEL` says; once a process.
pub fn init() -> Result<(), ConfigError> {
    let level = match std::env::var_os(VARIABLE) {
        Some(level) => level.to_string_lossy().into_owned(),
        None => DEFAULT.to_owned(),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter(&level)?)
        .with_writer(io::stderr)
        .with_ansi(has_colours(&io::stderr()))
        .init();
    Ok(())
}

fn filter(level: &str) -> Result<EnvFilter, ConfigError> {
    let refusal = || {
        ConfigError::new(format!(
            "{VARIABLE} must be a level (off, error, warn, info, debug or trace) or a list of levels by module such as \
             {DEFAULT}, not {level}"
        ))
    };
    // The library would read any other word as the name of a module, log all of that one and nothing else.
    let words = level.split(',').filter(|part| !part.is_empty() && !part.contains(['=', '[']));
    for word in words {
        word.parse::<LevelFilter>().map_err(|_| refusal())?;
    }
    EnvFilter::try_new(level).map_err(|_| refusal())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_or_a_list_by_module_is_accepted() {
        for level in
            ["warn,weft=info", "debug", "OFF", "trace", "error,weft::edge=debug,hyper=off", "weft[session]=info"]
        {
            assert!(filter(level).is_ok(), "{level}");
        }
    }

    #[test]
    fn what_is_no_level_is_refused_with_what_is_allowed() {
        for level in ["loud", "warn,weft=loud", "warn,loud", "weft", "=", "warn, weft=info"] {
            let why = filter(level).expect_err(level).to_string();
            assert!(why.starts_with("WEFT_LOG_LEVEL must be a level (off, error,"), "{why}");
            assert!(why.ends_with(&format!("not {level}")), "{why}");
        }
    }
}
