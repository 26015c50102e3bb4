//! Where an engine publishes its KV events, as this process can dial it.

use std::fmt;

/// Where the KV events of one DP rank come from, in the engine's own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvSource {
    /// Whose.
    pub dp_rank: u16,
    /// The publisher's endpoint, as the engine binds it.
    pub events: String,
    /// Where what was published can be asked for again.
    pub replay: Option<String>,
    /// What every message begins with; empty subscribes to everything.
    pub topic: String,
}

impl KvSource {
    /// The source of rank `dp_rank`, given the one of rank 0: the port counts up, as in vLLM and SGLang.
    ///
    /// # Errors
    /// If an address cannot be read, or the port would exceed 65535.
    pub fn of_rank(&self, dp_rank: u16) -> Result<Self, AddressError> {
        let shift = |endpoint: &str| {
            let address = ZmqAddress::parse(endpoint)?;
            let port = address.port.checked_add(dp_rank);
            let port = port.ok_or_else(|| AddressError::Port { endpoint: endpoint.to_owned() })?;
            Ok(ZmqAddress { port, ..address }.to_string())
        };
        Ok(Self {
            dp_rank,
            events: shift(&self.events)?,
            replay: self.replay.as_deref().map(shift).transpose()?,
            topic: self.topic.clone(),
        })
    }

    /// Where to dial the events and the replay of an engine that is reached at `engine_host`.
    ///
    /// # Errors
    /// If an address cannot be read, or is of a kind that does not leave the engine's host.
    pub fn dialled(&self, engine_host: &str) -> Result<Dialled, AddressError> {
        let events = ZmqAddress::parse(&self.events)?;
        let replay = self.replay.as_deref().map(ZmqAddress::parse).transpose()?;
        Ok(Dialled {
            dp_rank: self.dp_rank,
            events: events.reached_at(engine_host),
            replay: replay.map(|replay| replay.reached_at(engine_host)),
            topic: self.topic.clone(),
        })
    }

    /// Whether a vLLM engine binds its publisher: to a concrete address it connects instead, so that nobody can subscribe
    /// there.
    pub fn vllm_binds(&self) -> bool {
        self.events.contains('*') || self.events.contains("::")
    }
}

/// A [`KvSource`] as this process dials it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dialled {
    /// Whose.
    pub dp_rank: u16,
    /// The publisher.
    pub events: ZmqAddress,
    /// Where what was published can be asked for again.
    pub replay: Option<ZmqAddress>,
    /// What to subscribe to.
    pub topic: String,
}

/// A ZMQ endpoint over TCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZmqAddress {
    /// Name or number, without the brackets of IPv6. `*`, `0.0.0.0` and `::` stand for all addresses of the engine's host.
    pub host: String,
    /// At least 1.
    pub port: u16,
}

/// Why an endpoint cannot be dialled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// `inproc` and `ipc` do not leave the engine's host.
    #[error("{endpoint} is not a TCP endpoint: it cannot be reached from here; use tcp://*:PORT")]
    Transport {
        /// As it was given.
        endpoint: String,
    },
    /// No port, or not a port.
    #[error("{endpoint} has no valid port")]
    Port {
        /// As it was given.
        endpoint: String,
    },
}

impl ZmqAddress {
    /// Reads `tcp://HOST:PORT`.
    ///
    /// # Errors
    /// [`AddressError::Transport`] and [`AddressError::Port`].
    pub fn parse(endpoint: &str) -> Result<Self, AddressError> {
        let rest = endpoint.strip_prefix("tcp://");
        let rest = rest.ok_or_else(|| AddressError::Transport { endpoint: endpoint.to_owned() })?;
        let no_port = || AddressError::Port { endpoint: endpoint.to_owned() };
        let (host, port) = rest.rsplit_once(':').ok_or_else(no_port)?;
        let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(no_port)?;
        // vLLM also writes `tcp://:::5557`, all addresses of IPv6 without brackets.
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(no_port());
        }
        Ok(Self { host: host.to_owned(), port })
    }

    /// Whether it stands for all addresses of a host.
    pub fn is_wildcard(&self) -> bool {
        matches!(self.host.as_str(), "*" | "0.0.0.0" | "::")
    }

    /// The same, with the engine's own host in place of a wildcard: all addresses of its host are reached where the
    /// engine itself is.
    pub fn reached_at(self, engine_host: &str) -> Self {
        if !self.is_wildcard() {
            return self;
        }
        let host = engine_host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        Self { host: host.unwrap_or(engine_host).to_owned(), port: self.port }
    }
}

impl fmt::Display for ZmqAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "tcp://[{}]:{}", self.host, self.port),
            false => write!(f, "tcp://{}:{}", self.host, self.port),
        }
    }
}
