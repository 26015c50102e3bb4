//! What is known of a gateway, and the set of all of them.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr};

/// Bytes of a gateway's or a fleet's name: those of a DNS name.
pub const NAME_BYTES_MAX: usize = 253;
/// Gateways of a set. Every agent dials every gateway, so a fleet has a handful.
pub const GATEWAYS_MAX: usize = 256;

/// A name or an address that cannot be used, as a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not a name.
    #[error(
        "`{text}` is not a {what}'s name: write 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes or underscores"
    )]
    Name {
        /// Of what.
        what: &'static str,
        /// What was given.
        text: String,
    },
    /// Not a host and a port.
    #[error(
        "`{text}` is not HOST:PORT: write, for instance, gateway.example:7070, 10.0.0.7:7070 or [fd00::7]:7070"
    )]
    Address {
        /// What was given.
        text: String,
    },
    /// An address to listen on, not to dial.
    #[error(
        "{address} cannot be dialled from elsewhere: announce an address under which agents reach this gateway"
    )]
    NotDialable {
        /// The address.
        address: HostPort,
    },
}

/// Whether `text` may name a gateway or a fleet: it becomes part of an etcd key, of log lines and of URLs.
pub(crate) fn check_name(what: &'static str, text: &str) -> Result<(), RecordError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(allowed) {
        let text: String = text.chars().take(80).collect();
        return Err(RecordError::Name { what, text });
    }
    Ok(())
}

/// A host (a name, or an address; IPv6 without brackets) and a port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    host: String,
    port: u16,
}

impl HostPort {
    /// From parts that are at hand.
    ///
    /// # Errors
    /// The host is neither a DNS name nor an address, or the port is 0.
    pub fn new(host: impl Into<String>, port: u16) -> Result<Self, RecordError> {
        let host = host.into();
        let is_host = host.parse::<IpAddr>().is_ok() || check_name("host", &host).is_ok();
        if !is_host || port == 0 {
            let text = format!("{}:{port}", host.chars().take(80).collect::<String>());
            return Err(RecordError::Address { text });
        }
        Ok(Self { host, port })
    }

    /// The name or address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port; never 0.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The host, if it is an address.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

impl From<std::net::SocketAddr> for HostPort {
    fn from(address: std::net::SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

impl FromStr for HostPort {
    type Err = RecordError;

    fn from_str(text: &str) -> Result<Self, RecordError> {
        let wrong = || RecordError::Address { text: text.chars().take(80).collect() };
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let host = match host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')) {
            Some(inner) if inner.contains(':') => inner,
            // An IPv6 address without brackets: its last group is not a port.
            None if !host.contains(':') => host,
            _ => return Err(wrong()),
        };
        let port = port.parse().map_err(|_| wrong())?;
        Self::new(host, port).map_err(|_| wrong())
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// What is known of one gateway.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct GatewayRecord {
    /// Unique in its fleet.
    pub name: String,
    /// Where agents dial it.
    pub address: HostPort,
    /// The name that its certificate must have, if not the host of `address`.
    pub server_name: Option<String>,
}

impl GatewayRecord {
    /// A record to announce, whose certificate names the host of its address.
    ///
    /// # Errors
    /// The name or the address cannot be used by others.
    pub fn new(name: impl Into<String>, address: HostPort) -> Result<Self, RecordError> {
        let record = Self { name: name.into(), address, server_name: None };
        record.check()?;
        Ok(record)
    }

    /// Whether it may be announced.
    pub(crate) fn check(&self) -> Result<(), RecordError> {
        let Self { name, address, server_name } = self;
        check_name("gateway", name)?;
        if let Some(server_name) = server_name {
            check_name("server", server_name)?;
        }
        if address.ip().is_some_and(|ip| ip.is_unspecified() || ip.is_multicast()) {
            return Err(RecordError::NotDialable { address: address.clone() });
        }
        Ok(())
    }
}

/// A complete set of gateways, in order of their names, of which each is there once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Gateways(Vec<GatewayRecord>);

impl Gateways {
    /// The first [`GATEWAYS_MAX`] of `records` by name; of two with one name, the later.
    pub fn new(records: impl IntoIterator<Item = GatewayRecord>) -> Self {
        let by_name: BTreeMap<String, GatewayRecord> =
            records.into_iter().map(|record| (record.name.clone(), record)).collect();
        Self(by_name.into_values().take(GATEWAYS_MAX).collect())
    }

    /// In order of their names.
    pub fn records(&self) -> &[GatewayRecord] {
        &self.0
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The one of this name.
    pub fn get(&self, name: &str) -> Option<&GatewayRecord> {
        let at = self.0.binary_search_by(|record| record.name.as_str().cmp(name)).ok()?;
        Some(&self.0[at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written_alike() {
        for text in ["gateway.example:7070", "10.0.0.7:1", "[fd00::7]:65535", "localhost:7070", "gw_1:80"] {
            assert_eq!(text.parse::<HostPort>().expect(text).to_string(), text);
        }
        let wrong = [
            "",
            "host",
            "host:",
            "host:0",
            "host:65536",
            ":7070",
            "fd00::7:7070",
            "[fd00::7]",
            "[host]:1",
            "http://host:1",
            "a b:1",
            "host:-1",
            "user@host:1",
            "host/path:1",
        ];
        for text in wrong {
            let error = text.parse::<HostPort>().expect_err(text).to_string();
            assert!(error.starts_with(&format!("`{text}` is not HOST:PORT: write")), "{error}");
        }
    }

    #[test]
    fn records_that_nobody_could_dial_are_refused() {
        let record =
            |name: &str, address: &str| GatewayRecord::new(name, address.parse().expect("an address"));
        assert!(record("gw-0", "10.0.0.7:7070").is_ok());
        for address in ["0.0.0.0:7070", "[::]:7070", "224.0.0.1:7070"] {
            let error = record("gw-0", address).expect_err(address).to_string();
            assert!(error.starts_with(&format!("{address} cannot be dialled")), "{error}");
        }
        for name in ["", "a/b", "ä", "a b", &"x".repeat(254)] {
            assert!(matches!(record(name, "h:1"), Err(RecordError::Name { .. })), "{name}");
        }
    }

    #[test]
    fn a_set_is_sorted_unique_and_bounded() {
        let record = |name: &str, port| {
            GatewayRecord::new(name, HostPort::new("h", port).expect("a host")).expect("a record")
        };
        let set = Gateways::new([record("b", 1), record("a", 2), record("b", 3)]);
        assert_eq!(set.records(), [record("a", 2), record("b", 3)]);
        assert_eq!((set.get("b"), set.get("c")), (Some(&record("b", 3)), None));
        let many = Gateways::new((0..1_000).map(|n| record(&format!("gw-{n:04}"), 1)));
        assert_eq!((many.len(), many.records()[GATEWAYS_MAX - 1].name.as_str()), (GATEWAYS_MAX, "gw-0255"));
    }
}
