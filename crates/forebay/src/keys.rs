//! `forebay keys`: a random key for a tenant, and the line that lets it in.

use std::fmt::Write as _;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

use crate::{
    exit::{Exit, Failed},
    terminal::{Terminal, Tone},
};

/// Random bytes in a key: nobody guesses 192 bits.
const KEY_BYTES: usize = 24;

/// Every key begins with this, so that people and scanners recognise one that leaked.
const KEY_PREFIX: &str = "fbk-";

/// Longest name of a tenant, as the gateway reads it.
const TENANT_BYTES_MAX: usize = 64;

/// Draws a key, shows it on standard error and writes its line of the key file to standard output.
///
/// # Errors
/// A name that the file could not hold, or a system without randomness.
pub(crate) fn add(tenant: &str, terminal: Terminal) -> anyhow::Result<Exit> {
    if tenant.is_empty()
        || tenant.len() > TENANT_BYTES_MAX
        || !tenant.bytes().all(|byte| byte.is_ascii_graphic())
    {
        let sentence =
            format!("`{tenant}` is no name for a tenant: it must be visible ASCII, at most 64 bytes");
        return Err(Failed { exit: Exit::Usage, sentence }.into());
    }
    let mut random = [0; KEY_BYTES];
    getrandom::fill(&mut random).context("the system gives no random bytes")?;
    let key = format!("{KEY_PREFIX}{}", hex(&random));
    let paint = terminal.paint_err;
    terminal.err(&format!(
        "Key of {tenant}, shown only now:\n\n  {}\n\nLine for the file that `--api-keys` names:\n\n",
        paint.tone(Tone::Strong, &key)
    ));
    terminal.out(&line(&key, tenant))?;
    Ok(Exit::Ok)
}

/// A key's line: its SHA-256, and whose it is.
fn line(key: &str, tenant: &str) -> String {
    format!("{} {tenant}\n", hex(&Sha256::digest(key.as_bytes())))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use forebay_gateway::http::ApiKeys;

    use super::*;

    #[test]
    fn the_gateway_reads_what_is_written() {
        let keys = ApiKeys::parse(&format!("# ours\n{}", line("fbk-00", "acme"))).unwrap();
        assert_eq!(keys.tenant("fbk-00").map(ToString::to_string).as_deref(), Some("acme"));
        assert_eq!(keys.tenant("fbk-01"), None);
    }
}
