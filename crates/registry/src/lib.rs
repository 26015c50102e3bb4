#![doc = include_str!("../README.md")]

mod announcement;
mod backoff;
#[cfg(feature = "testing")]
pub mod conformance;
pub mod etcd;
mod join;
mod location;
mod memory;
mod publish;
mod record;
mod registry;
#[cfg(feature = "testing")]
pub mod testing;

pub use announcement::{Announcement, AnnouncementState, WITHDRAW_MAX};
pub use etcd::{Credentials, Etcd, EtcdSettings, EtcdTls};
pub use join::{JOIN_NAMES_MAX, Join, JoinSettings, Resolve, SystemResolver};
pub use location::{EtcdLocation, LocationError, parse_join};
pub use memory::Memory;
pub use record::{GATEWAYS_MAX, GatewayRecord, Gateways, HostPort, NAME_BYTES_MAX, RecordError};
pub use registry::{Health, Registry, RegistryError, RegistryState, Watch};

/// A future that a trait object gives.
pub type BoxFuture<'a, T> = std::pin::Pin<Box<dyn Future<Output = T> + Send + 'a>>;
