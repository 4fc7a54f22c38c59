//! What is on the wire and in the log, and nothing else: every type here is pure, knows no other room, and is what
//! `schemas/` is generated from.

pub mod agui;
pub mod asyncapi;
pub mod batch;
pub mod command;
pub mod compatible;
pub mod components;
pub mod custom;
pub mod data;
pub mod dead_letters;
pub mod delta;
pub mod error;
pub mod event;
pub mod frame;
pub mod groups;
pub mod http;
pub mod ids;
pub mod json;
pub mod kinds;
pub mod letters;
pub mod records;
pub mod schemas;
pub mod strict;
pub mod tickets;
pub mod work;
