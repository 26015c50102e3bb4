//! What users write: `--join HOST:PORT,…` and `--registry etcd://…`.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use forebay_proto::{Secret, tls::TlsFiles};

use crate::{
    etcd::{Credentials, EtcdSettings, EtcdTls, LEASE_DEFAULT, LEASE_RANGE},
    join::JOIN_NAMES_MAX,
    record::{HostPort, check_name},
    registry::RegistryError,
};

/// etcd's port, where none is written.
const ETCD_PORT: u16 = 2379;
/// The fleet, where none is written.
const FLEET_DEFAULT: &str = "default";
/// Bytes of a password file.
const PASSWORD_BYTES_MAX: usize = 1_024;
/// What may follow the question mark.
const KEYS: &str = "lease_seconds, password_file, ca, cert, key, server_name";

/// What is wrong with what was written, and what to write. It never quotes a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LocationError(String);

/// The names of a `--join` list: `HOST:PORT`, separated by commas.
///
/// # Errors
/// What is wrong, with an example.
pub fn parse_join(list: &str) -> Result<Vec<HostPort>, LocationError> {
    let names: Vec<HostPort> = list
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(|name| name.parse().map_err(|error| LocationError(format!("{error}"))))
        .collect::<Result<_, _>>()?;
    if names.is_empty() {
        let what = "no gateway to join: write HOST:PORT, or several with commas between, for instance \
                    gateways.example:7070; a name with several addresses is several gateways";
        return Err(LocationError(what.to_owned()));
    }
    if names.len() > JOIN_NAMES_MAX {
        return Err(LocationError(format!(
            "{} names to join, at most {JOIN_NAMES_MAX} are allowed",
            names.len()
        )));
    }
    Ok(names)
}

/// A parsed `etcd://[USER[:PASSWORD]@]HOST[:PORT][,HOST[:PORT]…][/FLEET][?KEY=VALUE&…]`. The files it names are read by
/// [`EtcdLocation::settings`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdLocation {
    /// Members of the cluster.
    pub endpoints: Vec<HostPort>,
    /// Which fleet; `default` unless written.
    pub fleet: String,
    /// Who one is, if written.
    pub user: Option<String>,
    /// The password in the URL. A file is better: command lines are seen by others.
    pub password: Option<Secret>,
    /// `password_file=`: a file whose first line is the password.
    pub password_file: Option<PathBuf>,
    /// `ca=`: switches TLS on.
    pub ca: Option<PathBuf>,
    /// `cert=` and `key=`: a certificate of one's own, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// `server_name=`: what etcd's certificate names, if not the host.
    pub server_name: Option<String>,
    /// `lease_seconds=`
    pub lease: Duration,
}

impl EtcdLocation {
    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong, and what to write instead.
    pub fn parse(url: &str) -> Result<Self, LocationError> {
        let wrong = |what: String| {
            LocationError(format!(
                "{what}; write etcd://HOST:PORT/FLEET, for instance etcd://10.0.0.7:2379/prod"
            ))
        };
        let Some(rest) = url.strip_prefix("etcd://") else {
            let scheme = url.split_once("://").map_or("no scheme", |(scheme, _)| scheme);
            let scheme: String = scheme.chars().take(20).collect();
            return Err(wrong(format!("a registry's URL begins with etcd://, not with {scheme}")));
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        // The last one: a password may have one in it, a host may not.
        let (credentials, rest) = match rest.rsplit_once('@') {
            Some((credentials, rest)) => (Some(credentials), rest),
            None => (None, rest),
        };
        let (hosts, fleet) = rest.split_once('/').unwrap_or((rest, ""));
        let fleet = fleet.trim_end_matches('/');
        let fleet = if fleet.is_empty() { FLEET_DEFAULT } else { fleet };
        check_name("fleet", fleet).map_err(|error| wrong(error.to_string()))?;
        let endpoints: Vec<HostPort> = hosts
            .split(',')
            .filter(|host| !host.is_empty())
            .map(|host| endpoint(host).map_err(&wrong))
            .collect::<Result<_, _>>()?;
        if endpoints.is_empty() {
            return Err(wrong("the URL of etcd has no host".to_owned()));
        }
        let (user, password) = parse_credentials(credentials).map_err(&wrong)?;
        let mut location = Self {
            endpoints,
            fleet: fleet.to_owned(),
            user,
            password,
            password_file: None,
            ca: None,
            identity: None,
            server_name: None,
            lease: LEASE_DEFAULT,
        };
        location.parse_query(query)?;
        Ok(location)
    }

    fn parse_query(&mut self, query: &str) -> Result<(), LocationError> {
        let (mut cert, mut key) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let Some((name, value)) = pair.split_once('=') else {
                return Err(LocationError(format!(
                    "`{pair}` in the URL of etcd has no value: write {pair}=…"
                )));
            };
            let value = percent_decoded(value).filter(|value| !value.is_empty()).ok_or_else(|| {
                LocationError(format!("the value of {name} in the URL of etcd cannot be read"))
            })?;
            match name {
                "lease_seconds" => self.lease = parse_lease(&value)?,
                "password_file" => self.password_file = Some(value.into()),
                "ca" => self.ca = Some(value.into()),
                "cert" => cert = Some(PathBuf::from(value)),
                "key" => key = Some(PathBuf::from(value)),
                "server_name" => self.server_name = Some(value),
                _ => {
                    let name: String = name.chars().take(40).collect();
                    return Err(LocationError(format!(
                        "`{name}` in the URL of etcd is not known: there are {KEYS}"
                    )));
                }
            }
        }
        self.identity = match (cert, key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            _ => {
                return Err(LocationError(
                    "cert= and key= in the URL of etcd go together: write both".to_owned(),
                ));
            }
        };
        if self.ca.is_none() && (self.identity.is_some() || self.server_name.is_some()) {
            let what = "TLS to etcd needs ca=PATH in its URL, the CA that signed its certificate";
            return Err(LocationError(what.to_owned()));
        }
        if self.password.is_some() && self.password_file.is_some() {
            let what = "a password in the URL of etcd and password_file= exclude each other: keep the file";
            return Err(LocationError(what.to_owned()));
        }
        if self.user.is_none() && self.password_file.is_some() {
            return Err(LocationError(
                "password_file= needs a user: write etcd://USER@HOST:PORT/FLEET".to_owned(),
            ));
        }
        if self.user.is_some() && self.password.is_none() && self.password_file.is_none() {
            let what = "the user of etcd has no password: add ?password_file=PATH to its URL";
            return Err(LocationError(what.to_owned()));
        }
        Ok(())
    }

    /// Reads the files that it names. `seed`: see [`EtcdSettings::seed`].
    ///
    /// # Errors
    /// A file that cannot be read or is not what it should be.
    pub fn settings(&self, seed: u64) -> Result<EtcdSettings, RegistryError> {
        let Self { endpoints, fleet, user, password, password_file, ca, identity, server_name, lease } = self;
        let password = match (password, password_file) {
            (None, Some(path)) => Some(read_password(path)?),
            (password, _) => password.clone(),
        };
        let credentials = user.clone().zip(password).map(|(user, password)| Credentials { user, password });
        let identity = identity.as_ref().map(|(cert, key)| (cert.as_path(), key.as_path()));
        let tls = ca
            .as_ref()
            .map(|ca| {
                let files = TlsFiles::read(ca, identity)?;
                Ok::<_, RegistryError>(EtcdTls { files, server_name: server_name.clone() })
            })
            .transpose()?;
        let (endpoints, fleet, lease) = (endpoints.clone(), fleet.clone(), *lease);
        Ok(EtcdSettings { endpoints, fleet, credentials, tls, lease, seed })
    }
}

/// `HOST` or `HOST:PORT`; brackets around IPv6.
fn endpoint(text: &str) -> Result<HostPort, String> {
    let has_port = if text.starts_with('[') { text.contains("]:") } else { text.contains(':') };
    let parsed = if has_port { text.parse() } else { format!("{text}:{ETCD_PORT}").parse() };
    parsed.map_err(|error: crate::record::RecordError| error.to_string())
}

fn parse_credentials(text: Option<&str>) -> Result<(Option<String>, Option<Secret>), String> {
    let Some(text) = text else { return Ok((None, None)) };
    let (user, password) = match text.split_once(':') {
        Some((user, password)) => (user, Some(password)),
        None => (text, None),
    };
    let unreadable =
        || "user or password in the URL of etcd cannot be read: write %25 for a %, %40 for an @".to_owned();
    let user = percent_decoded(user).ok_or_else(unreadable)?;
    if user.is_empty() {
        return Err("the URL of etcd has an @, but no user before it".to_owned());
    }
    let password = password.map(|password| percent_decoded(password).ok_or_else(unreadable)).transpose()?;
    Ok((Some(user), password.map(Secret::new)))
}

fn parse_lease(text: &str) -> Result<Duration, LocationError> {
    let lease = text.parse().ok().map(Duration::from_secs).filter(|lease| LEASE_RANGE.contains(lease));
    lease.ok_or_else(|| {
        let (shortest, longest) = (LEASE_RANGE.start().as_secs(), LEASE_RANGE.end().as_secs());
        LocationError(format!(
            "lease_seconds in the URL of etcd is a whole number from {shortest} to {longest}"
        ))
    })
}

/// The text behind `%41` and the like; `None` if it is malformed or not UTF-8.
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        bytes.push((digit()? * 16 + digit()?) as u8);
    }
    String::from_utf8(bytes).ok()
}

/// The first line of a file.
fn read_password(path: &Path) -> Result<Secret, RegistryError> {
    let unreadable = |cause| RegistryError::PasswordFile { path: path.to_owned(), cause };
    let text = fs::read_to_string(path).map_err(unreadable)?;
    let line = text.lines().next().unwrap_or_default();
    if line.is_empty() || line.len() > PASSWORD_BYTES_MAX {
        let what =
            format!("its first line has {} bytes; a password has 1 to {PASSWORD_BYTES_MAX}", line.len());
        return Err(unreadable(std::io::Error::new(std::io::ErrorKind::InvalidData, what)));
    }
    Ok(Secret::new(line))
}

#[cfg(test)]
mod tests;
