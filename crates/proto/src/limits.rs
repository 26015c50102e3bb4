//! Bounds of what may be in a message. A sender keeps to them; a reader refuses what exceeds them, except sentences for
//! people, which both sides cut.

use std::time::Duration;

/// Bytes of one encoded message, in either direction. A reader of a larger one closes the stream. The other bounds are
/// such that no legal message comes near; a test proves it.
pub const MESSAGE_BYTES_MAX: usize = 2 << 20;

/// Hashes in one piece of a snapshot: half a mebibyte, a few milliseconds of a gigabit.
pub const SNAPSHOT_CHUNK_HASHES_MAX: usize = 65_536;
/// Blocks of one rank's snapshot: half a gibibyte of hashes, a billion tokens at 16 a block.
pub const SNAPSHOT_BLOCKS_MAX: u64 = 1 << 26;
/// Hashes in one batch of cache events. A scheduler step stores as many blocks as it has tokens (8,192 with pages of one
/// token) and evicts about as many; a batch beyond this is replaced by a snapshot.
pub const BATCH_HASHES_MAX: usize = 131_072;
/// Events in one batch.
pub const BATCH_EVENTS_MAX: usize = 32_768;
/// Step observations in one message; what a driver keeps.
pub const STEPS_MAX: usize = 256;

/// Bytes of a name: engine, kind, model, alias, gateway, version, label key.
pub const NAME_BYTES_MAX: usize = 256;
/// Bytes of a sentence for people.
pub const SENTENCE_BYTES_MAX: usize = 1_024;
/// Bytes of a URL.
pub const URL_BYTES_MAX: usize = 2_048;
/// Bytes of an API key.
pub const API_KEY_BYTES_MAX: usize = 512;
/// Labels of one engine.
pub const LABELS_MAX: usize = 64;
/// Bytes of a label's value.
pub const LABEL_VALUE_BYTES_MAX: usize = 1_024;
/// Names that one engine answers to beside its model's.
pub const ALIASES_MAX: usize = 64;
/// Sentences for operators about one engine.
pub const NOTES_MAX: usize = 32;
/// DP ranks of one engine.
pub const DP_RANKS_MAX: u16 = 1_024;
/// Tokens of a KV block.
pub const BLOCK_SIZE_TOKENS_MAX: u32 = 65_536;

/// Log lines in one answer.
pub const LOG_LINES_MAX: usize = 1_000;
/// Bytes of one log line; longer ones are cut.
pub const LOG_LINE_BYTES_MAX: usize = 4_096;
/// Bytes of all log lines in one answer; the oldest go first.
pub const LOG_BYTES_MAX: usize = 1 << 20;
/// Log lines with an engine's last words.
pub const LAST_WORDS_LINES_MAX: usize = 100;

/// Bytes of one piece of a tokenizer's file.
pub const TOKENIZER_CHUNK_BYTES_MAX: usize = 262_144;
/// Bytes of all files of a tokenizer. The largest published `tokenizer.json` are some 35 MB.
pub const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
/// Files of a tokenizer.
pub const TOKENIZER_FILES_MAX: usize = 8;

/// Shortest time between heartbeats that an agent accepts.
pub const HEARTBEAT_MIN: Duration = Duration::from_millis(50);
/// Longest lease that an agent accepts.
pub const LEASE_MAX: Duration = Duration::from_secs(600);
