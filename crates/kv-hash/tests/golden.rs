//! The checked-in vectors, computed by an implementation in another language that shares no code with this one.

use forebay_kv_hash::{BlockHasher, HashKey};
use forebay_types::{BlockHash, TokenId};

#[derive(serde::Deserialize)]
struct Golden {
    key: String,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    name: String,
    block_size_tokens: u32,
    model: String,
    salt: String,
    tokens: Vec<TokenId>,
    root: String,
    hashes: Vec<String>,
}

#[test]
fn golden_vectors_hold() {
    let golden: Golden = serde_json::from_str(include_str!("golden.json")).unwrap();
    let key: String = HashKey::GOLDEN.0.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(golden.key, key);
    for case in golden.cases {
        let hasher = BlockHasher::new(HashKey::GOLDEN, case.block_size_tokens);
        let root = hasher.root(&case.model, &case.salt);
        assert_eq!(root.to_string(), case.root, "{}", case.name);
        let hashes: Vec<_> = hasher.chain(root, &case.tokens).iter().map(BlockHash::to_string).collect();
        assert_eq!(hashes, case.hashes, "{}", case.name);
    }
}
