//! KV events: what the engine announces, as vLLM publishes it.
//!
//! The [`ledger`] knows the tokens behind the engine's hashes, [`encode`] writes batches, [`publish`] has the sockets, and
//! [`watch`] is the one reader of the engine's reports. Start at [`watch::run`].

mod encode;
mod ledger;
mod publish;
mod ring;
mod watch;

pub(crate) use self::{
    ledger::{Chain, Ledger},
    publish::{EventPorts, Publisher},
    watch::run,
};
