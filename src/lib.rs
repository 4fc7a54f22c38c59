//! Weft: an event-sourced messaging backend for AI platforms. The way of one event, from socket to socket:
//!
//! 1. [`edge`]: a WebSocket session reads a frame, and its command is parsed into a type of [`protocol`];
//! 2. [`ingest`]: the publish is admitted, by the rights that [`auth`] looks up, and becomes a record;
//! 3. [`log`]: the record becomes durable;
//! 4. [`projector`]: reads the log in order, judges each record, gives it its seq and commits rows to the [`store`];
//! 5. [`delivery`]: the commit answers the publisher and goes to the outbox of each reader of the thread;
//! 6. [`edge`]: the reader's session writes it to its socket.
//!
//! Beside it: [`views`] are pure folds of events into what others speak, [`reaper`] ends runs that nobody ends,
//! [`search`] finds events by their words, [`webhook`] tells a backend of them, [`outbound`] calls other services,
//! [`client`] and [`cli`] use the server from outside. [`app`] puts the parts together and is the only file that names
//! them all. Folders are layers: each imports only from those further down this page's way, never back.

pub mod app;
pub mod auth;
pub mod cli;
pub mod client;
pub mod clock;
pub mod codec;
pub mod config;
pub mod delivery;
pub mod disk;
pub mod dispatch;
pub mod edge;
pub mod ingest;
pub mod log;
pub mod memory;
pub mod outbound;
pub mod panics;
pub mod partitioning;
pub mod projector;
pub mod protocol;
pub mod reaper;
pub mod search;
pub mod store;
pub mod telemetry;
pub mod views;
pub mod webhook;
