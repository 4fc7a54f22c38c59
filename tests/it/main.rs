//! Every integration test, in one binary: a file for each of the seven areas, the log's contract and crashes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

mod connection;
mod crash;
mod house;
mod log_contract;
mod model;
mod performance;
mod persistence;
mod reliability;
mod routing;
mod services;
mod streaming;
