//! Ingest: from a parsed command to a record in the log.
//!
//! - [`limits`] and [`admit`]: whether a publish is admitted;
//! - [`coalesce`]: deltas of one message that come in quick succession become one record;
//! - [`submit`]: the record goes to the log, and [`pending`] knows who waits for its verdict;
//! - [`kinds`]: what data of custom kinds is held to;
//! - [`tickets`]: what goes the same way without being a publish.

pub mod admit;
pub mod coalesce;
pub mod kinds;
pub mod limits;
pub mod pending;
pub mod submit;
pub mod tickets;
