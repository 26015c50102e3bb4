//! From an engine's blocks to our own: where a chain stands, and what of it an engine's block completes.
//!
//! Engine blocks of E tokens lie side by side, and so do ours of B. An engine's block completes those of ours that end in
//! it; the tokens after the last such end are carried on to what follows. E may be smaller than B, greater, or divide
//! nothing.

use std::fmt::Write as _;

use forebay_kv_hash::BlockHasher;
use forebay_types::{BlockHash, TokenId};
use smallvec::SmallVec;

use crate::event::{ExtraKey, Stored};

/// In place of a model's name where what is hashed belongs to no model's plain text. No served model has a name like it.
const PRIVATE: &str = "\0forebay/engine-events/1 private";

/// Our blocks that one engine block completes; E is rarely more than four B.
pub(super) type Own = SmallVec<[BlockHash; 4]>;

/// Where a chain stands at the end of some engine block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    /// What our next block is hashed after: a root, our last block, or either one made private.
    after: BlockHash,
    /// Our last complete block; `None` before the first.
    last: Option<BlockHash>,
    /// Tokens since.
    tail: SmallVec<[TokenId; 16]>,
}

impl Chain {
    pub(super) fn at_root(root: BlockHash) -> Self {
        Self { after: root, last: None, tail: SmallVec::new() }
    }

    /// After `block`, which is complete.
    pub(super) fn after_block(block: BlockHash) -> Self {
        Self { after: block, last: Some(block), tail: SmallVec::new() }
    }

    /// Whether an engine block that completed `own` completed `block` and no more, and ends with it.
    pub(super) fn completes_one(&self, own: &Own, block: BlockHash) -> bool {
        own[..] == [block] && self.tail.is_empty()
    }

    /// Goes on over the tokens of one engine block; what that completes goes into `own`, which is cleared first.
    pub(super) fn advance(&mut self, hasher: &BlockHasher, tokens: &[TokenId], own: &mut Own) {
        own.clear();
        let size = hasher.block_size_tokens() as usize;
        let mut rest = tokens;
        if !self.tail.is_empty() {
            let (fill, after_fill) = rest.split_at(rest.len().min(size - self.tail.len()));
            self.tail.extend_from_slice(fill);
            rest = after_fill;
            if self.tail.len() == size {
                self.after = hasher.next(self.after, &self.tail);
                self.tail.clear();
                own.push(self.after);
            }
        }
        let blocks = rest.chunks_exact(size);
        self.tail.extend_from_slice(blocks.remainder());
        for block in blocks {
            self.after = hasher.next(self.after, block);
            own.push(self.after);
        }
        self.last = own.last().copied().or(self.last);
    }

    /// Makes what follows match nothing that has not the same `keys` in the same place.
    pub(super) fn make_private<'a>(
        &mut self,
        hasher: &BlockHasher,
        keys: impl IntoIterator<Item = &'a ExtraKey>,
    ) {
        let mut salt = format!("{}", self.after);
        for key in keys {
            let (kind, bytes) = match key {
                ExtraKey::Text(text) => ('t', text.as_bytes()),
                ExtraKey::Other(raw) => ('o', &**raw),
            };
            let _ = write!(salt, " {kind}");
            for byte in bytes {
                let _ = write!(salt, "{byte:02x}");
            }
        }
        self.after = hasher.root(PRIVATE, &salt);
    }
}

/// What an engine hash stands for.
#[derive(Debug)]
pub(super) enum Identity {
    /// Completes one block of ours and ends with it: the common case, E = B.
    One(BlockHash),
    /// Completes several and ends with the last.
    Many(Box<[BlockHash]>),
    /// Ends within a block of ours, whatever it completes.
    Open(Box<(Own, Chain)>),
    /// Announced with two different prefixes: stands for nothing.
    Ambiguous,
}

impl Identity {
    /// Of an engine block that completes `own`, after which `chain` stands.
    pub(super) fn new(own: &Own, chain: &Chain) -> Self {
        match &own[..] {
            &[block] if chain.tail.is_empty() => Self::One(block),
            blocks @ [_, _, ..] if chain.tail.is_empty() => Self::Many(blocks.into()),
            _ => Self::Open(Box::new((own.clone(), chain.clone()))),
        }
    }

    /// Our blocks that it completes.
    pub(super) fn own(&self) -> &[BlockHash] {
        match self {
            Self::One(block) => std::slice::from_ref(block),
            Self::Many(blocks) => blocks,
            Self::Open(open) => &open.0,
            Self::Ambiguous => &[],
        }
    }

    /// Whether it is what was computed again; an ambiguous one is not computed at all.
    pub(super) fn agrees(&self, own: &Own, chain: &Chain) -> bool {
        match self {
            Self::Ambiguous => true,
            Self::Open(open) => open.0 == *own && open.1 == *chain,
            Self::One(_) | Self::Many(_) => self.own() == &own[..] && chain.tail.is_empty(),
        }
    }

    /// Where a chain stands after it.
    pub(super) fn chain(&self) -> Option<Chain> {
        match self {
            Self::Open(open) => Some(open.1.clone()),
            Self::One(_) | Self::Many(_) => {
                let &last = self.own().last()?;
                Some(Chain::after_block(last))
            }
            Self::Ambiguous => None,
        }
    }
}

/// Where the chain of an event without a parent starts, its first block's keys included.
///
/// The adapter's name stands in the model's place; the salt is SGLang's field or vLLM's one text in the first block's keys
/// that is not the adapter's name. An adapter without a name and keys of any other kind make the chain private.
pub(super) fn root(hasher: &BlockHasher, model: &str, event: &Stored) -> Chain {
    let keys = event.extra_keys.as_ref().and_then(|blocks| blocks.first()).map_or(&[][..], Vec::as_slice);
    let mut salts = unnamed(keys, event.lora_name.as_deref()).filter_map(|key| match key {
        ExtraKey::Text(text) => Some(&**text),
        ExtraKey::Other(_) => None,
    });
    let salt = event.salt.as_deref().or_else(|| salts.next());
    let more_salts = salts.next().is_some();
    let name = event.lora_name.as_deref().unwrap_or(model);
    let mut chain = Chain::at_root(hasher.root(name, salt.unwrap_or_default()));
    if more_salts || keys.iter().any(|key| matches!(key, ExtraKey::Other(_))) {
        chain.make_private(hasher, keys);
    }
    if let (Some(id), None) = (event.lora_id, &event.lora_name) {
        chain.make_private(hasher, &[ExtraKey::Text(format!("lora {id}").into())]);
    }
    chain
}

/// The keys of one block beside its adapter's name.
pub(super) fn unnamed<'a>(
    keys: &'a [ExtraKey],
    lora_name: Option<&'a str>,
) -> impl Iterator<Item = &'a ExtraKey> + Clone {
    keys.iter().filter(move |key| !matches!(key, ExtraKey::Text(text) if Some(&**text) == lora_name))
}
