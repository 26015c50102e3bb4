//! API keys: who may ask, and in whose name. Only hashes are kept, at rest and in memory.

use std::hint::black_box;

use forebay_types::TenantId;
use sha2::{Digest, Sha256};

/// Longest tenant name, bytes.
const TENANT_BYTES_MAX: usize = 64;

/// The keys of one file.
///
/// One key a line: the SHA-256 of the key in hexadecimal, white space, the tenant's name (visible ASCII). A tenant may
/// have several keys. Empty lines and lines that begin with `#` are skipped. A line for the key in `$KEY`:
/// `echo "$(printf %s "$KEY" | sha256sum | cut -d' ' -f1) tenant-name"`.
#[derive(Clone)]
pub struct ApiKeys {
    entries: Vec<([u8; 32], TenantId)>,
}

/// Why a file of keys is unusable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// A line does not read as hash and tenant.
    #[error("line {line}: {reason}; expected `<64 hexadecimal digits of SHA-256> <tenant>`")]
    BadLine {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The same key twice, which would leave its tenant to chance.
    #[error("line {line}: this key is already on line {first}; remove one of them")]
    Duplicate {
        /// Counted from 1.
        line: usize,
        /// Where it was first.
        first: usize,
    },
    /// Nothing but comments: nobody could ask anything.
    #[error("the file has no keys; add a line `<64 hexadecimal digits of SHA-256> <tenant>`")]
    Empty,
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiKeys").field("keys", &self.entries.len()).finish_non_exhaustive()
    }
}

impl ApiKeys {
    /// Reads the contents of a file.
    ///
    /// # Errors
    /// The first line that is wrong, by its number.
    pub fn parse(text: &str) -> Result<Self, KeysError> {
        let mut entries: Vec<([u8; 32], TenantId)> = Vec::new();
        let mut lines: Vec<usize> = Vec::new();
        for (index, raw) in text.lines().enumerate() {
            let (line, content) = (index + 1, raw.trim());
            if content.is_empty() || content.starts_with('#') {
                continue;
            }
            let entry = parse_line(content).map_err(|reason| KeysError::BadLine { line, reason })?;
            if let Some(first) = entries.iter().position(|(hash, _)| *hash == entry.0) {
                return Err(KeysError::Duplicate { line, first: lines[first] });
            }
            entries.push(entry);
            lines.push(line);
        }
        if entries.is_empty() { Err(KeysError::Empty) } else { Ok(Self { entries }) }
    }

    /// Whose key this is. Takes the same time whichever key matches, if any.
    pub fn tenant(&self, key: &str) -> Option<&TenantId> {
        let presented: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let mut found = None;
        for (hash, tenant) in &self.entries {
            if equal_in_constant_time(hash, &presented) {
                found = Some(tenant);
            }
        }
        found
    }
}

fn parse_line(content: &str) -> Result<([u8; 32], TenantId), &'static str> {
    let mut words = content.split_whitespace();
    let (hex, tenant) = (words.next().unwrap_or_default(), words.next().ok_or("the tenant is missing")?);
    if words.next().is_some() {
        return Err("there is a third word");
    }
    if tenant.len() > TENANT_BYTES_MAX || !tenant.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the tenant must be visible ASCII, at most 64 bytes");
    }
    let digits: Option<Vec<u8>> = hex.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
    let digits = digits.ok_or("the hash is not hexadecimal")?;
    if digits.len() != 64 {
        return Err("the hash does not have 64 hexadecimal digits");
    }
    let hash = std::array::from_fn(|index| digits[2 * index] << 4 | digits[2 * index + 1]);
    Ok((hash, TenantId::from(tenant)))
}

/// `black_box` keeps the compiler from turning the sum of differences back into an early exit.
fn equal_in_constant_time(left: &[u8; 32], right: &[u8; 32]) -> bool {
    black_box(left.iter().zip(right).fold(0, |difference, (a, b)| difference | (a ^ b))) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SHA-256 of `hello`.
    const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    #[test]
    fn a_key_names_its_tenant() {
        let keys = ApiKeys::parse(&format!("# ours\n\n{HELLO}  acme\n")).unwrap();
        assert_eq!(keys.tenant("hello"), Some(&TenantId::from("acme")));
        assert_eq!(keys.tenant("hello "), None);
        assert_eq!(keys.tenant(""), None);
        assert!(!format!("{keys:?}").contains("acme"));
    }

    #[test]
    fn a_wrong_line_is_named_by_its_number() {
        let check =
            |text: &str, expected: &str| assert_eq!(ApiKeys::parse(text).unwrap_err().to_string(), expected);
        let form = "expected `<64 hexadecimal digits of SHA-256> <tenant>`";
        check(&format!("#\n{HELLO}"), &format!("line 2: the tenant is missing; {form}"));
        check(&format!("{HELLO} a b"), &format!("line 1: there is a third word; {form}"));
        check("abc acme", &format!("line 1: the hash does not have 64 hexadecimal digits; {form}"));
        check(&format!("+{} acme", &HELLO[1..]), &format!("line 1: the hash is not hexadecimal; {form}"));
        check(&format!("{}é acme", &HELLO[2..]), &format!("line 1: the hash is not hexadecimal; {form}"));
        check(
            &format!("{HELLO} a\n#\n{HELLO} b"),
            "line 3: this key is already on line 1; remove one of them",
        );
        check(
            "# nothing\n",
            &format!("the file has no keys; add a line {}", form.trim_start_matches("expected ")),
        );
    }
}
