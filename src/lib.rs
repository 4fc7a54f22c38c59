//! Weft: an event-sourced messaging backend for AI platforms. The way of one event, in order:
//!
//! - [`edge`]: a socket's frame becomes a [`command`], is checked ([`access`], [`identity`]) and becomes an [`event`];
//! - [`submit`]: the event becomes a record of the [`log`], durable there, and whoever waits is noted;
//! - [`projector`]: reads the log in order, judges, gives the seq, commits rows to the [`store`];
//! - [`hub`]: answers the publisher and hands the event to each reader's [`outbox`], which the session writes to its socket.
//!
//! Beside it: [`edge::subscriptions`] brings readers from the store to the live feed, [`rebuild`] makes the store anew,
//! [`limits`] tells who asks too much, [`health`] and [`telemetry`] tell how it goes. [`app`] puts the parts together;
//! [`client`] and [`cli`] use it from outside.

pub mod app;
pub mod auth;
pub mod cli;
pub mod client;
pub mod clock;
pub mod codec;
pub mod config;
pub mod delivery;
pub mod disk;
pub mod edge;
pub mod ingest;
pub mod log;
pub mod projector;
pub mod protocol;
pub mod reaper;
pub mod store;
pub mod telemetry;
pub mod views;
