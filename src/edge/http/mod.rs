//! HTTP requests and replies, and a file for each resource.

pub mod context;
pub mod dead_letters;
pub mod page;
pub mod reply;
pub mod runs;
pub mod sessions;
pub mod threads;
