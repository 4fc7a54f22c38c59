//! Other forms of a thread. Pure: event frames go in, and what clients of other protocols read comes out.

pub mod agui;
pub mod chat;
pub mod export;
