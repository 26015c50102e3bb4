//! The commands as people and scripts meet them: the real binary against scripted servers on loopback.

mod chat;
mod config;
mod fleet;
mod help;
mod index_server;
mod simulate;
mod support;
mod terminal;
