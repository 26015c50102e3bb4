//! A directory of clients: what ServeGen publishes of a service.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context as _, bail};
use forebay_twin::{ClientError, ClientMix};

use super::input::read;

/// Most clients of a mix.
const CLIENTS_MAX: usize = 10_000;
/// Largest file of one client; ServeGen's have some megabytes.
const CLIENT_BYTES_MAX: u64 = 256 << 20;

/// Reads `chunk-N-trace.csv` and `chunk-N-dataset.json` for every N that there is.
///
/// # Errors
/// A file that cannot be read, lacks the other one, or is wrong: with its name, line and column.
pub(super) fn client_mix(directory: &Path) -> anyhow::Result<ClientMix> {
    let named = || directory.display().to_string();
    let mut numbers = BTreeSet::new();
    for entry in fs::read_dir(directory).with_context(named)? {
        let name = entry.with_context(named)?.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("chunk-")?.strip_suffix("-trace.csv")?.parse().ok());
        numbers.extend(number.map(|number: u32| number));
        if numbers.len() > CLIENTS_MAX {
            bail!("{}: more than {CLIENTS_MAX} clients", named());
        }
    }
    if numbers.is_empty() {
        bail!(
            "{}: no chunk-N-trace.csv in it; a mix of clients is a directory as ServeGen has them",
            named()
        );
    }
    let mut mix = ClientMix::default();
    for number in numbers {
        let file = |kind: &str| directory.join(format!("chunk-{number}-{kind}"));
        let (windows, lengths) = (file("trace.csv"), file("dataset.json"));
        let text = (read(&windows, CLIENT_BYTES_MAX)?, read(&lengths, CLIENT_BYTES_MAX)?);
        mix.add(&format!("client-{number}"), &text.0, &text.1).map_err(|error| {
            let path = if matches!(error, ClientError::Windows(_)) { &windows } else { &lengths };
            anyhow::Error::new(error).context(path.display().to_string())
        })?;
    }
    Ok(mix)
}
