//! The command line of `index-server`.

use std::{net::SocketAddr, time::Duration};

use clap::Args;
use forebay_index_server::service::EngineSpec;

use super::positive_duration;
use crate::settings::SharedFlags;

/// Flags of `index-server`.
#[derive(Debug, Args)]
pub(crate) struct IndexServerArgs {
    /// Address of the HTTP side.
    ///
    /// It asks for no key: an address that other machines can reach needs `--insecure`.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8082")]
    pub(crate) listen: SocketAddr,
    /// Address of the gRPC side.
    ///
    /// It asks for no key: an address that other machines can reach needs `--insecure`.
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8083")]
    pub(crate) grpc_listen: SocketAddr,
    /// An engine to follow from the start, such as name=a,model=M,events=tcp://host:5557,replay=tcp://host:5558.
    ///
    /// Also dp-ranks=N (the ports then count up from rank 0's; or give `events` and `replay` once for each rank),
    /// block-size=N (tokens of its own blocks: events with others are then refused) and topic=T. Without `events` it is fed by
    /// hand. Repeat the flag for more; others can be registered later.
    #[arg(long, value_name = "SPEC", value_parser = EngineSpec::parse)]
    pub(crate) engine: Vec<EngineSpec>,
    /// Engines registered at a time.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub(crate) engines_max: usize,
    /// Blocks followed for each rank; more are left out and counted.
    #[arg(long, value_name = "N", default_value_t = forebay_index_server::service::BLOCKS_MAX_DEFAULT)]
    pub(crate) rank_blocks_max: usize,
    /// How long an engine that cannot be reached is believed to have what it had.
    ///
    /// One without `replay` is not believed at all once its connection broke: nothing shows what was missed.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = positive_duration)]
    pub(crate) lease: Duration,
    /// Settings that it shares with `serve`.
    #[command(flatten)]
    pub(crate) shared: SharedFlags,
}
