//! The commands as people and scripts meet them: the real binary against scripted servers on loopback.

mod audit;
mod bench;
mod chat;
mod config;
mod fleet;
mod help;
mod index_server;
mod profile;
mod simulate;
mod support;
mod terminal;
