//! The fast encoder against `tokenizers`, for every family: drawn texts, this project's own files, and words without end.
//!
//! `FOREBAY_FUZZ_STRINGS=10000000 cargo test --release -p forebay-text --test exact` draws ten million texts a family.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test's helpers may do what its tests may")]

mod common;

use common::{families::Family, texts::Texts};
use forebay_text::{Backend, Distance, Preference, PrefixCache, PrefixCacheLimits, Tokenizer};

/// A little more than half a minute for all families on one core.
const STRINGS: u64 = 100_000;

#[expect(clippy::disallowed_methods, reason = "a test has no settings")]
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A family's tokenizer by its fast and by its reference back end.
struct Pair {
    fast: Tokenizer,
    reference: Tokenizer,
    added: Vec<String>,
}

impl Pair {
    fn find(name: &str) -> Option<Self> {
        let Family { source, added } = Family::find(name)?;
        let reference = Tokenizer::load(source.clone(), Preference::Reference).unwrap();
        let fast = Tokenizer::load(source, Preference::FastIfExact).unwrap();
        assert_eq!((fast.backend(), reference.backend()), (Backend::Bpe, Backend::Tokenizers), "{name}");
        Some(Self { fast, reference, added })
    }

    fn check(&self, encode: impl Fn(&Tokenizer, &mut Vec<u32>), text: &str, of: &str) {
        let (mut ids, mut exact) = (Vec::new(), Vec::new());
        encode(&self.fast, &mut ids);
        encode(&self.reference, &mut exact);
        if ids != exact {
            let at = ids.iter().zip(&exact).take_while(|(a, b)| a == b).count();
            let begin: String = text.chars().take(2_000).collect();
            panic!("{of}: {begin:?} differs at token {at}: {:?}", (ids.get(at..), exact.get(at..)));
        }
    }

    fn check_all_ways(&self, text: &str, of: &str) {
        self.check(|tokenizer, out| tokenizer.encode(text, out).unwrap(), text, of);
        self.check(|tokenizer, out| tokenizer.encode_plain(text, out).unwrap(), text, of);
        self.check(|tokenizer, out| tokenizer.encode_completion(text, out).unwrap(), text, of);
    }
}

fn check(name: &str) {
    let Some(pair) = Pair::find(name) else { return };
    let tokens: Vec<String> = (0..pair.fast.vocab_size())
        .filter_map(|token| {
            String::from_utf8(pair.fast.token_bytes(u32::try_from(token).unwrap()).to_vec()).ok()
        })
        .filter(|text| !text.is_empty())
        .collect();
    let (seed, strings) = (number("FOREBAY_FUZZ_SEED", 1), number("FOREBAY_FUZZ_STRINGS", STRINGS));
    let mut texts = Texts::new(seed, &pair.added, &tokens);
    let mut bytes = 0;
    for index in 0..strings {
        let text = texts.next();
        bytes += text.len();
        let of = || format!("{name}, text {index} of FOREBAY_FUZZ_SEED={seed}");
        if index % 16 == 0 {
            pair.check_all_ways(&text, &of());
        } else {
            pair.check(|tokenizer, out| tokenizer.encode(&text, out).unwrap(), &text, &of());
        }
    }
    eprintln!("{name}: {strings} texts of {} bytes on average", bytes as u64 / strings.max(1));
    check_prefixes(&pair, &mut texts, name);
    for (file, text) in own_files() {
        pair.check_all_ways(&text, &format!("{name}, {file}"));
    }
    for text in endless_words() {
        pair.check_all_ways(&text, name);
    }
}

/// Conversations that grow turn by turn, where turns begin and end like special tokens do or nearly do.
fn check_prefixes(pair: &Pair, texts: &mut Texts<'_>, name: &str) {
    // Short pieces, so that texts are cut wherever they may be.
    let pieces = Distance { token_bytes_min: 32, word_bytes_min: 24 };
    let cache = PrefixCache::with_pieces_of(PrefixCacheLimits { bytes_max: 1 << 20 }, pieces);
    for conversation in 0..200 {
        let mut text = String::new();
        for turn in 0..8 {
            for _ in 0..2 + texts.below(8) {
                text.push_str(&texts.next());
                text.push_str(&pair.added[texts.below(pair.added.len())]);
            }
            text.push_str(&texts.next());
            let (mut ids, mut exact) = (Vec::new(), Vec::new());
            cache.encode(&pair.fast, "tenant", &text, &mut ids).unwrap();
            pair.fast.encode(&text, &mut exact).unwrap();
            assert!(ids == exact, "{name}, turn {turn} of conversation {conversation}: {text:?}");
        }
    }
    let stats = cache.stats();
    assert!(stats.bytes_reused > stats.bytes_encoded, "{name}: {stats:?}");
    assert!(stats.bytes <= 1 << 20, "{name}: {stats:?}");
}

/// Prose, tables and code that people wrote, some of it cut at a character's border.
fn own_files() -> Vec<(&'static str, String)> {
    let files = [
        ("ARCHITECTURE.md", include_str!("../../../ARCHITECTURE.md")),
        ("corpus.rs", include_str!("../src/tokenizer/corpus.rs")),
        ("texts.rs", include_str!("common/texts.rs")),
        ("check_structure.py", include_str!("../../../scripts/check_structure.py")),
        ("Cargo.toml", include_str!("../../../Cargo.toml")),
    ];
    files.map(|(name, text)| (name, text.chars().take(30_000).collect())).into()
}

/// Words that a heap must merge, and runs that a pattern reads to their end.
fn endless_words() -> Vec<String> {
    let random = |alphabet: &str, count: usize| -> String {
        let alphabet: Vec<char> = alphabet.chars().collect();
        let mut texts = Texts::new(3, &[], &[]);
        (0..count).map(|_| alphabet[texts.below(alphabet.len())]).collect()
    };
    vec![
        random("abcdefghijklmnopqrstuvwxyz", 3_000),
        random("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", 3_000),
        random("天地玄黃宇宙洪荒日月盈昃", 1_500),
        random(" \t\n\r\u{a0}", 2_000),
        random("eta ", 3_000),
        random("\u{301}e\u{323}가\u{11a8}", 1_000),
        "a".repeat(3_000),
        " ".repeat(3_000) + "x",
        "\n".repeat(3_000) + "x",
        "=".repeat(3_000),
        "9".repeat(3_000),
        "😀".repeat(700),
        "・ー".repeat(700),
    ]
}

macro_rules! families {
    ($($test:ident: $name:literal,)*) => {
        $(#[test]
        fn $test() {
            check($name);
        })*

        #[test]
        fn every_family_has_its_test() {
            assert_eq!(common::families::FAMILIES, [$($name),*]);
        }
    };
}

families! {
    llama_3_is_exact: "llama-3.1",
    qwen_3_is_exact: "qwen-3",
    deepseek_v3_is_exact: "deepseek-v3",
    gpt_oss_is_exact: "gpt-oss",
    gemma_3_is_exact: "gemma-3",
    mistral_is_exact: "mistral-tekken",
    smollm_is_exact: "smollm-2",
}
