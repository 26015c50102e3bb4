//! What tests of registries and of their users run against: a real etcd, and a name server that can fail.

mod etcd_server;
mod names;

pub use etcd_server::{EtcdServer, ServerTls};
pub use names::FakeNames;
