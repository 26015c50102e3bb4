//! The shapes of one event: which key, or which place in a list, means what.

use forebay_types::{Tier, TokenId};
use rmp::Marker;

use super::{Decoder, Problem, tier};
use crate::event::{EngineEvent, EngineHash, ExtraKey, GroupKind, Removed, Stored};

/// Bytes kept of the name of an unknown type.
const TAG_BYTES_MAX: usize = 64;

/// A part of an event. Its name is the engines'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Type,
    BlockHashes,
    ParentBlockHash,
    TokenIds,
    BlockSize,
    LoraId,
    Medium,
    LoraName,
    ExtraKeys,
    GroupIdx,
    KvCacheSpecKind,
    SlidingWindow,
    Locality,
    CacheSalt,
    Metadata,
    /// Known to no version of this crate.
    Unknown,
}

/// What follows the type of a stored block in an event that is a list. vLLM lengthened it over time; the places are those
/// of its newest. SGLang puts metadata where vLLM has the adapter's name.
const STORED: [Field; 10] = [
    Field::BlockHashes,
    Field::ParentBlockHash,
    Field::TokenIds,
    Field::BlockSize,
    Field::LoraId,
    Field::Medium,
    Field::LoraName,
    Field::ExtraKeys,
    Field::GroupIdx,
    Field::KvCacheSpecKind,
];
/// The same of a removed block.
const REMOVED: [Field; 3] = [Field::BlockHashes, Field::Medium, Field::GroupIdx];

impl Field {
    const fn name(self) -> &'static str {
        match self {
            Self::Type => "type",
            Self::BlockHashes => "block_hashes",
            Self::ParentBlockHash => "parent_block_hash",
            Self::TokenIds => "token_ids",
            Self::BlockSize => "block_size",
            Self::LoraId => "lora_id",
            Self::Medium => "medium",
            Self::LoraName => "lora_name",
            Self::ExtraKeys => "extra_keys",
            Self::GroupIdx => "group_idx",
            Self::KvCacheSpecKind => "kv_cache_spec_kind",
            Self::SlidingWindow => "kv_cache_spec_sliding_window",
            Self::Locality => "locality",
            Self::CacheSalt => "cache_salt",
            Self::Metadata => "metadata",
            Self::Unknown => "an unknown field",
        }
    }

    fn of_key(key: &str) -> Self {
        match key {
            "type" => Self::Type,
            "block_hashes" => Self::BlockHashes,
            "parent_block_hash" => Self::ParentBlockHash,
            "token_ids" => Self::TokenIds,
            "block_size" => Self::BlockSize,
            "lora_id" => Self::LoraId,
            "medium" => Self::Medium,
            "lora_name" => Self::LoraName,
            "extra_keys" => Self::ExtraKeys,
            "group_idx" => Self::GroupIdx,
            "kv_cache_spec_kind" => Self::KvCacheSpecKind,
            "kv_cache_spec_sliding_window" => Self::SlidingWindow,
            "locality" => Self::Locality,
            "cache_salt" => Self::CacheSalt,
            "metadata" => Self::Metadata,
            _ => Self::Unknown,
        }
    }
}

/// A problem and the field that has it.
type Wrong = (&'static str, Problem);

/// What one event says, whatever its shape. The outer `None` is: not said; the inner: said to be nothing.
#[derive(Default)]
pub(super) struct Fields<'a> {
    tag: Option<&'a str>,
    hashes: Option<Vec<EngineHash>>,
    parent: Option<Option<EngineHash>>,
    tokens: Option<Vec<TokenId>>,
    block_size_tokens: Option<u32>,
    lora_id: Option<u32>,
    medium: Option<&'a str>,
    lora_name: Option<&'a str>,
    extra_keys: Option<Vec<Vec<ExtraKey>>>,
    group: Option<u32>,
    kind: Option<GroupKind>,
    window_tokens: Option<u32>,
    remote: bool,
    salt: Option<&'a str>,
}

impl<'a> Fields<'a> {
    pub(super) fn read(decoder: &mut Decoder<'a>) -> Result<Self, Wrong> {
        let shape = |problem| ("shape", problem);
        let mut fields = Self::default();
        match decoder.reader.peek().map_err(shape)? {
            Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => {
                for _ in 0..decoder.reader.map("an event").map_err(shape)? {
                    let key = decoder.key().map_err(|problem| ("keys", problem))?;
                    fields.take(key.map_or(Field::Unknown, Field::of_key), decoder)?;
                }
            }
            _ => {
                let elements = decoder.reader.array("an event (a list or a map)").map_err(shape)?;
                if elements > 0 {
                    fields.take(Field::Type, decoder)?;
                }
                let places: &[Field] = match fields.tag {
                    Some("BlockStored") => &STORED,
                    Some("BlockRemoved") => &REMOVED,
                    _ => &[],
                };
                for index in 0..elements.saturating_sub(1) {
                    fields.take(places.get(index).copied().unwrap_or(Field::Unknown), decoder)?;
                }
            }
        }
        Ok(fields)
    }

    fn take(&mut self, field: Field, decoder: &mut Decoder<'a>) -> Result<(), Wrong> {
        self.take_value(field, decoder).map_err(|problem| (field.name(), problem))
    }

    fn take_value(&mut self, field: Field, decoder: &mut Decoder<'a>) -> Result<(), Problem> {
        let reader = &mut decoder.reader;
        // Nothing is as good as not there, except for a parent, which must be said to be nothing.
        if !matches!(field, Field::Type | Field::ParentBlockHash | Field::Unknown) && reader.nil() {
            return Ok(());
        }
        match field {
            Field::Type => self.tag = Some(reader.text("the name of a type")?),
            Field::BlockHashes => self.hashes = Some(decoder.hashes()?),
            Field::ParentBlockHash => {
                self.parent = Some(if reader.nil() { None } else { Some(decoder.hash()?) });
            }
            Field::TokenIds => self.tokens = Some(decoder.tokens()?),
            Field::BlockSize => {
                self.block_size_tokens = Some(reader.unsigned("a number of tokens (0 to 4294967295)")?);
            }
            Field::LoraId => self.lora_id = Some(reader.unsigned("a number (0 to 4294967295)")?),
            Field::Medium => self.medium = Some(reader.text("a text")?),
            Field::LoraName => match reader.peek()? {
                Marker::FixMap(_) | Marker::Map16 | Marker::Map32 => self.take_metadata(decoder)?,
                _ => self.lora_name = Some(reader.text("a text")?),
            },
            Field::ExtraKeys => self.extra_keys = Some(extra_keys(decoder)?),
            Field::GroupIdx => self.group = Some(reader.unsigned("a number (0 to 4294967295)")?),
            Field::KvCacheSpecKind => self.kind = Some(GroupKind::from_name(reader.text("a text")?)),
            Field::SlidingWindow => {
                self.window_tokens = Some(reader.unsigned("a number of tokens (0 to 4294967295)")?);
            }
            Field::Locality => self.remote = reader.text("a text")?.eq_ignore_ascii_case("REMOTE"),
            Field::CacheSalt => self.salt = Some(reader.text("a text")?),
            Field::Metadata => self.take_metadata(decoder)?,
            Field::Unknown => drop(reader.raw()?),
        }
        Ok(())
    }

    /// SGLang's, of which only the salt matters.
    fn take_metadata(&mut self, decoder: &mut Decoder<'a>) -> Result<(), Problem> {
        for _ in 0..decoder.reader.map("a map")? {
            match decoder.key()? {
                Some("cache_salt") if !decoder.reader.nil() => {
                    self.salt = Some(decoder.reader.text("a text")?);
                }
                Some("cache_salt") => {}
                _ => drop(decoder.reader.raw()?),
            }
        }
        Ok(())
    }

    /// The event, if all that its type needs was said.
    pub(super) fn event(self) -> Result<EngineEvent, Wrong> {
        let missing = |field: Field| move || (field.name(), Problem::Missing);
        let tier = if self.remote { Tier::Remote } else { tier(self.medium) };
        Ok(match self.tag.ok_or_else(missing(Field::Type))? {
            "BlockStored" => EngineEvent::Stored(Stored {
                hashes: self.hashes.ok_or_else(missing(Field::BlockHashes))?,
                parent: self.parent.ok_or_else(missing(Field::ParentBlockHash))?,
                tokens: self.tokens.ok_or_else(missing(Field::TokenIds))?,
                block_size_tokens: self.block_size_tokens.ok_or_else(missing(Field::BlockSize))?,
                lora_id: self.lora_id,
                lora_name: self.lora_name.map(Into::into),
                salt: self.salt.map(Into::into),
                extra_keys: self.extra_keys,
                tier,
                group: self.group,
                kind: self.kind,
                window_tokens: self.window_tokens,
            }),
            "BlockRemoved" => EngineEvent::Removed(Removed {
                hashes: self.hashes.ok_or_else(missing(Field::BlockHashes))?,
                tier,
                group: self.group,
            }),
            "AllBlocksCleared" => EngineEvent::Cleared,
            other => {
                let end = other.floor_char_boundary(TAG_BYTES_MAX);
                EngineEvent::Unknown { tag: other[..end].into() }
            }
        })
    }
}

/// One list of keys a block, or nothing for a block without.
fn extra_keys(decoder: &mut Decoder<'_>) -> Result<Vec<Vec<ExtraKey>>, Problem> {
    let blocks = decoder.reader.array("a list")?;
    decoder.count_hashes(blocks)?;
    let mut all = Vec::with_capacity(blocks);
    for _ in 0..blocks {
        let mut keys = Vec::new();
        match decoder.reader.peek()? {
            Marker::Null => drop(decoder.reader.nil()),
            Marker::FixArray(_) | Marker::Array16 | Marker::Array32 => {
                let count = decoder.reader.array("a list")?;
                decoder.count_hashes(count)?;
                for _ in 0..count {
                    keys.push(extra_key(decoder)?);
                }
            }
            // No shape that is known: a key all the same, so that the block matches nothing else.
            _ => keys.push(extra_key(decoder)?),
        }
        all.push(keys);
    }
    Ok(all)
}

fn extra_key(decoder: &mut Decoder<'_>) -> Result<ExtraKey, Problem> {
    Ok(match decoder.reader.peek()? {
        Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => {
            ExtraKey::Text(decoder.reader.text("a text")?.into())
        }
        _ => ExtraKey::Other(decoder.reader.raw()?.into()),
    })
}
