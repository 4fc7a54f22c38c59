//! Every integration test, in one binary, so that it is linked once: a folder for each area.
//!
//! - `connection`: who gets in, what a bad frame or too many of them cost, how sessions end
//! - `routing`: who gets what
//! - `streaming`: events, runs and messages in deltas on their way to readers
//! - `reliability`: acknowledgements, durable subscriptions, dead letters, flow control, brokers and clients that fail
//! - `damage`: files that were changed, cut or lost, and disks that fail
//! - `persistence`: keys, projections and their rebuild
//! - `queues`: work of groups, whoever is killed, stopped or late
//! - `services`: HTTP, health, metrics, schemas and the command
//! - `performance`: the benchmark measures what the server did
//! - `golden`: logs of released versions, which come to the same for ever
//! - `log_contract`: what both logs promise; `model`: random acts against a model; `crash`: kills
//!
//! `support` has the server, the clients and the waiting. It checks every frame and body against `schemas/`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

mod connection;
mod crash;
mod damage;
mod golden;
mod house;
mod log_contract;
mod model;
mod performance;
mod persistence;
mod queues;
mod reliability;
mod routing;
mod services;
mod streaming;
