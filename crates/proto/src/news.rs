//! The rest of what is said: notices, ends, logs, and a gateway's welcome.

use std::time::Duration;

use crate::{
    engine::{CacheSight, required},
    error::WireError,
    limits::{
        BLOCK_SIZE_TOKENS_MAX, HEARTBEAT_MIN, LAST_WORDS_LINES_MAX, LEASE_MAX, LOG_BYTES_MAX,
        LOG_LINE_BYTES_MAX, LOG_LINES_MAX,
    },
    text::{clip, name, sentence},
    v1,
};

/// News of an engine that lives on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// It is silent beyond its deadline: nothing new goes there until it is heard of again.
    Silent {
        /// A sentence.
        why: String,
    },
    /// It is heard of again.
    Heard,
    /// It said something that cannot be true: nothing new goes there in this incarnation.
    Fenced {
        /// A sentence.
        why: String,
    },
    /// How much is known of its cache has changed.
    CacheSight(CacheSight),
    /// Something that an operator should read.
    Note(String),
}

impl TryFrom<v1::Notice> for Notice {
    type Error = WireError;

    fn try_from(message: v1::Notice) -> Result<Self, WireError> {
        use v1::notice::{Fenced, Heard, News, Note, Silent};
        let v1::Notice { news } = message;
        Ok(match required(news, "Notice", "news of a kind that this version knows")? {
            News::Silent(Silent { why }) => Self::Silent { why: sentence(why) },
            News::Heard(Heard {}) => Self::Heard,
            News::Fenced(Fenced { why }) => Self::Fenced { why: sentence(why) },
            News::CacheSight(sight) => Self::CacheSight(sight.try_into()?),
            News::Note(Note { text }) => Self::Note(sentence(text)),
        })
    }
}

impl From<Notice> for v1::Notice {
    fn from(notice: Notice) -> Self {
        use v1::notice::{Fenced, Heard, News, Note, Silent};
        let news = match notice {
            Notice::Silent { why } => News::Silent(Silent { why: sentence(why) }),
            Notice::Heard => News::Heard(Heard {}),
            Notice::Fenced { why } => News::Fenced(Fenced { why: sentence(why) }),
            Notice::CacheSight(sight) => News::CacheSight(sight.into()),
            Notice::Note(text) => News::Note(Note { text: sentence(text) }),
        };
        Self { news: Some(news) }
    }
}

/// The last words of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Died {
    /// One sentence.
    pub last_words: String,
    /// The last lines it logged, oldest first.
    pub log_tail: Vec<String>,
}

impl From<v1::Died> for Died {
    /// Keeps what the bounds allow: a death is believed however it is told.
    fn from(message: v1::Died) -> Self {
        let v1::Died { last_words, log_tail } = message;
        Self { last_words: sentence(last_words), log_tail: last_lines(log_tail, LAST_WORDS_LINES_MAX) }
    }
}

/// The message of an engine's death, with the last lines of its log (oldest first) that the bounds allow.
pub fn died(
    last_words: &str,
    log: impl IntoIterator<Item = String, IntoIter: DoubleEndedIterator>,
) -> v1::Died {
    v1::Died { last_words: sentence(last_words.to_owned()), log_tail: last_lines(log, LAST_WORDS_LINES_MAX) }
}

/// The answer to a `RequestLogs`, of the last `lines` lines of the log (oldest first) that the bounds allow. A gateway
/// reads [`v1::Logs`] through it as well, to hold an agent to the bounds.
pub fn logs(
    request_id: u64,
    lines: usize,
    log: impl IntoIterator<Item = String, IntoIter: DoubleEndedIterator>,
) -> v1::Logs {
    v1::Logs { request_id, lines: last_lines(log, lines.min(LOG_LINES_MAX)) }
}

fn last_lines(
    log: impl IntoIterator<Item = String, IntoIter: DoubleEndedIterator>,
    lines_max: usize,
) -> Vec<String> {
    let mut room = LOG_BYTES_MAX;
    let mut kept: Vec<String> = log
        .into_iter()
        .rev()
        .take(lines_max)
        .map(|line| if line.len() > LOG_LINE_BYTES_MAX { clip(&line, LOG_LINE_BYTES_MAX) } else { line })
        .take_while(|line| {
            let fits = line.len() <= room;
            room = room.saturating_sub(line.len());
            fits
        })
        .collect();
    kept.reverse();
    kept
}

/// The agent is taken in: a gateway's answer to Hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// What both sides speak from now on; the agent holds it against its own with [`agree`](crate::agree).
    pub wire_version: u32,
    /// Who this is.
    pub gateway: String,
    /// How this fleet names blocks.
    pub hash_key: HashKey,
    /// Time between heartbeats.
    pub heartbeat_interval: Duration,
    /// Silence after which the incarnation is void.
    pub lease: Duration,
}

/// How a fleet names blocks.
#[derive(Clone, PartialEq, Eq)]
pub struct HashKey {
    /// A secret: `Debug` does not print it.
    pub key: [u8; 16],
    /// Tokens of a block of the fleet's hash.
    pub block_size_tokens: u32,
}

impl std::fmt::Debug for HashKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { key: _, block_size_tokens } = self;
        f.debug_struct("HashKey").field("key", &"***").field("block_size_tokens", block_size_tokens).finish()
    }
}

impl TryFrom<v1::Welcome> for Welcome {
    type Error = WireError;

    fn try_from(message: v1::Welcome) -> Result<Self, WireError> {
        let v1::Welcome { wire_version, gateway, hash_key, heartbeat_interval_ms, lease_ms } = message;
        let heartbeat_interval = Duration::from_millis(heartbeat_interval_ms.into());
        let lease = Duration::from_millis(lease_ms.into());
        if heartbeat_interval < HEARTBEAT_MIN {
            let (what, got) = ("the heartbeat interval", format!("{heartbeat_interval:?}"));
            return Err(WireError::Range { what, got, must: "at least 50 ms" });
        }
        if lease < 2 * heartbeat_interval || lease > LEASE_MAX {
            let (what, got) = ("the lease", format!("{lease:?}"));
            return Err(WireError::Range {
                what,
                got,
                must: "at least two heartbeats and at most 10 minutes",
            });
        }
        Ok(Self {
            wire_version,
            gateway: name("the gateway's name", gateway)?,
            hash_key: required(hash_key, "Welcome", "hash_key")?.try_into()?,
            heartbeat_interval,
            lease,
        })
    }
}

impl From<Welcome> for v1::Welcome {
    fn from(welcome: Welcome) -> Self {
        let Welcome { wire_version, gateway, hash_key, heartbeat_interval, lease } = welcome;
        let milliseconds = |duration: Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
        Self {
            wire_version,
            gateway,
            hash_key: Some(hash_key.into()),
            heartbeat_interval_ms: milliseconds(heartbeat_interval),
            lease_ms: milliseconds(lease),
        }
    }
}

impl TryFrom<v1::HashKey> for HashKey {
    type Error = WireError;

    fn try_from(message: v1::HashKey) -> Result<Self, WireError> {
        let v1::HashKey { key, block_size_tokens } = message;
        let got = key.len();
        let Ok(key) = <[u8; 16]>::try_from(key) else {
            let (what, got) = ("the length of the block hash's key", format!("{got} bytes"));
            return Err(WireError::Range { what, got, must: "16 bytes" });
        };
        if !(1..=BLOCK_SIZE_TOKENS_MAX).contains(&block_size_tokens) {
            let (what, got) = ("the block size of the block hash", block_size_tokens.to_string());
            return Err(WireError::Range { what, got, must: "from 1 to 65,536 tokens" });
        }
        Ok(Self { key, block_size_tokens })
    }
}

impl From<HashKey> for v1::HashKey {
    fn from(hash_key: HashKey) -> Self {
        let HashKey { key, block_size_tokens } = hash_key;
        Self { key: key.to_vec(), block_size_tokens }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn welcome() -> Welcome {
        Welcome {
            wire_version: 1,
            gateway: "gw-0".to_owned(),
            hash_key: HashKey { key: *b"0123456789abcdef", block_size_tokens: 16 },
            heartbeat_interval: Duration::from_secs(1),
            lease: Duration::from_secs(10),
        }
    }

    type Change = fn(&mut v1::Welcome);

    #[test]
    fn a_welcome_comes_back_and_one_that_cannot_be_kept_is_refused() {
        assert_eq!(Welcome::try_from(v1::Welcome::from(welcome())), Ok(welcome()));
        let refused = |change: Change| {
            let mut message = v1::Welcome::from(welcome());
            change(&mut message);
            Welcome::try_from(message).expect_err("refused").to_string()
        };
        let rows: [(Change, &str); 6] = [
            (|w| w.heartbeat_interval_ms = 0, "the heartbeat interval is 0ns; it must be at least 50 ms"),
            (|w| w.lease_ms = 1_999, "at least two heartbeats"),
            (|w| w.lease_ms = u32::MAX, "at most 10 minutes"),
            (|w| w.gateway.clear(), "the gateway's name is empty"),
            (|w| w.hash_key = None, "Welcome has no hash_key, which is required"),
            (|w| w.hash_key.as_mut().unwrap().key.truncate(15), "is 15 bytes; it must be 16 bytes"),
        ];
        for (change, wrong) in rows {
            let error = refused(change);
            assert!(error.contains(wrong), "{error}");
        }
    }

    #[test]
    fn notices_come_back() {
        for notice in [
            Notice::Silent { why: "no metrics for 3 s".to_owned() },
            Notice::Heard,
            Notice::Fenced { why: "its block size changed".to_owned() },
            Notice::CacheSight(CacheSight::Approximate { why: "its events stopped".to_owned() }),
            Notice::Note("started without --enable-prefix-caching".to_owned()),
        ] {
            assert_eq!(Notice::try_from(v1::Notice::from(notice.clone())), Ok(notice));
        }
        let unknown = Notice::try_from(v1::Notice { news: None }).expect_err("unknown");
        assert_eq!(
            unknown.to_string(),
            "Notice has no news of a kind that this version knows, which is required"
        );
    }

    #[test]
    fn logs_keep_their_end_within_the_bounds() {
        let line = |n: usize| format!("line {n}");
        let kept = logs(3, 10, (0..50).map(line).collect::<Vec<_>>());
        assert_eq!((kept.request_id, kept.lines), (3, (40..50).map(line).collect()));
        assert_eq!(logs(3, usize::MAX, (0..5_000).map(line).collect::<Vec<_>>()).lines.len(), LOG_LINES_MAX);
        let long = died("signal 9", vec!["x".repeat(1 << 20); 300]);
        assert_eq!(long.log_tail.len(), LAST_WORDS_LINES_MAX);
        assert!(long.log_tail.iter().all(|line| line.len() <= LOG_LINE_BYTES_MAX && line.ends_with('…')));
        let wide = logs(3, 1_000, vec!["y".repeat(LOG_LINE_BYTES_MAX); 1_000]).lines;
        assert_eq!(wide.len() * LOG_LINE_BYTES_MAX, LOG_BYTES_MAX);
        let believed = Died::from(v1::Died { last_words: "z".repeat(5_000), log_tail: vec![] });
        assert!(believed.last_words.len() <= crate::limits::SENTENCE_BYTES_MAX);
    }
}
