//! The ports of a double's ranks.

use std::io;

use super::net::Port;

/// The ports of one rank.
#[derive(Debug, Default)]
pub(crate) struct RankPorts {
    pub(crate) events: Option<Port>,
    pub(crate) replay: Option<Port>,
    /// vLLM: NIXL's side channel. SGLang: the load socket.
    pub(crate) other: Option<Port>,
}

/// Which ports ranks need.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PortPlan {
    pub(crate) ranks: usize,
    /// Port of rank 0's events, 0 for any; `None` for no events.
    pub(crate) events: Option<u16>,
    pub(crate) replay: bool,
    /// Each rank's event ports are anywhere; otherwise they are side by side.
    pub(crate) scattered: bool,
    /// Port of rank 0's third socket, 0 for any; `None` for no such socket.
    pub(crate) other: Option<u16>,
}

impl PortPlan {
    pub(crate) fn take(self) -> io::Result<Vec<RankPorts>> {
        let events = self.row(self.events, self.scattered)?;
        let replay = self.row(self.events.filter(|_| self.replay).map(|_| 0), self.scattered)?;
        let other = self.row(self.other, false)?;
        let rows = events.into_iter().zip(replay).zip(other);
        Ok(rows.map(|((events, replay), other)| RankPorts { events, replay, other }).collect())
    }

    /// A port for each rank, or none for any.
    fn row(&self, first: Option<u16>, scattered: bool) -> io::Result<Vec<Option<Port>>> {
        match first {
            None => Ok((0..self.ranks).map(|_| None).collect()),
            Some(_) if scattered => (0..self.ranks).map(|_| Port::take(0).map(Some)).collect(),
            Some(first) => Ok(Port::take_adjacent(first, self.ranks)?.into_iter().map(Some).collect()),
        }
    }
}
