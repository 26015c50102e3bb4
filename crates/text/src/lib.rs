#![doc = include_str!("../README.md")]

mod detokenizer;
mod stop;
mod template;
mod tokenizer;

pub use detokenizer::Detokenizer;
pub use forebay_bpe::Distance;
pub use stop::{STOP_STRING_BYTES_MAX, STOP_STRINGS_MAX, StopError, StopMatcher};
pub use template::{
    ChatTemplate, Content, Conversation, Message, Part, TEMPLATE_BYTES_MAX, TEMPLATE_FUEL, TemplateError,
    Text, UnixTime,
};
pub use tokenizer::{
    Backend, EncodeError, Fingerprint, GgufVocabulary, LoadError, Preference, PrefixCache, PrefixCacheLimits,
    PrefixCacheStats, Source, Tokenizer,
};
