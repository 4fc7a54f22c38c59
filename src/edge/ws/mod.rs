//! WebSocket sessions.

pub mod commands;
pub mod flood;
pub mod session;
pub mod socket;
pub mod subscribe;
pub mod upgrade;
