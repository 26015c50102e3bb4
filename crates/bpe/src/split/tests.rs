//! Every rule against its pattern in the engine that `tokenizers` uses.

use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

use super::*;

const LLAMA: &str = r#"{"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}"#;
const QWEN: &str = r#"{"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}"#;
const O200K: &str = r#"{"type": "Split", "pattern": {"Regex": "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}"#;
const TEKKEN: &str = r#"{"type": "Split", "pattern": {"Regex": "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}"#;
const GPT2: &str = r#"{"type": "Split", "pattern": {"Regex": "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}"#;
const SMOLLM: &str = r#"{"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true},
    {"type": "Split", "pattern": {"Regex": "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}]}"#;
const DEEPSEEK: &str = r##"{"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": false},
    {"type": "Split", "pattern": {"Regex": "[一-龥぀-ゟ゠-ヿ]+"}, "behavior": "Isolated", "invert": false},
    {"type": "Split", "pattern": {"Regex": "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}]}"##;

/// One character or more of everything that a rule tells apart, and pairs that patterns name.
const PIECES: [&str; 44] = [
    " ", "\t", "\n", "\r", "\u{b}", "\u{a0}", "\u{3000}", "a", "S", "é", "É", "ſ", "ǅ", "ʰ", "字", "か", "゙",
    "・", "゛", "鿿", "\u{301}", "\u{20dd}", "1", "٣", "²", "〇", "'", "'s", "'RE", "'ſ", "’", ".", "/", "_",
    "€", "😀", "\u{200d}", "\0", "\u{85}", "\u{ad}", "\u{e000}", "\u{378}", "ab", "  ",
];

fn expected(pre_tokenizer: &PreTokenizerWrapper, text: &str) -> Vec<(usize, usize)> {
    let mut pieces = PreTokenizedString::from(text);
    pre_tokenizer.pre_tokenize(&mut pieces).unwrap();
    let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
    splits.into_iter().map(|(_, offsets, _)| offsets).collect()
}

fn check(pattern: &str, rule: &impl Rule) {
    let pre_tokenizer: PreTokenizerWrapper = serde_json::from_str(pattern).unwrap();
    let compare = |text: &str| {
        let mut words = Vec::new();
        let mut at = 0;
        while at < text.len() {
            let end = rule.next(text.as_bytes(), at);
            words.push((at, end));
            at = end;
        }
        assert_eq!(words, expected(&pre_tokenizer, text), "{text:?}");
    };
    // All of three pieces, and longer ones from a fixed seed.
    for first in PIECES {
        for second in PIECES {
            for third in PIECES {
                compare(&[first, second, third].concat());
            }
        }
    }
    let mut state = 7_u64;
    for _ in 0..20_000 {
        let mut text = String::new();
        for _ in 0..9 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(PIECES[(state >> 33) as usize % PIECES.len()]);
        }
        compare(&text);
    }
}

#[test]
fn words_are_those_of_the_patterns() {
    check(LLAMA, &Llama::new(3));
    check(QWEN, &Llama::new(1));
    check(O200K, &O200k::new(3, true));
    check(TEKKEN, &O200k::new(1, false));
    check(GPT2, &Gpt2::new(false));
    check(SMOLLM, &Gpt2::new(true));
    check(DEEPSEEK, &DeepSeek::new());
}

/// Every character alone, and between letters: no version of Unicode differs.
#[test]
fn every_character_is_of_its_class() {
    let check = |pattern: &str, rule: &dyn Fn(&str) -> Vec<(usize, usize)>| {
        let pre_tokenizer: PreTokenizerWrapper = serde_json::from_str(pattern).unwrap();
        let mut text = String::new();
        for character in (0..0x3_2000).filter_map(char::from_u32) {
            text.extend(['a', character, 'B', character, ' ', character, '.', character, '1']);
            if text.len() > 4_000 {
                assert!(rule(&text) == expected(&pre_tokenizer, &text), "before {character:?}");
                text.clear();
            }
        }
    };
    fn words(rule: &impl Rule, text: &str) -> Vec<(usize, usize)> {
        let mut words = Vec::new();
        let mut at = 0;
        while at < text.len() {
            let end = rule.next(text.as_bytes(), at);
            words.push((at, end));
            at = end;
        }
        words
    }
    let (llama, o200k, smollm, deepseek) =
        (Llama::new(3), O200k::new(3, true), Gpt2::new(true), DeepSeek::new());
    check(LLAMA, &|text| words(&llama, text));
    check(O200K, &|text| words(&o200k, text));
    check(SMOLLM, &|text| words(&smollm, text));
    check(DEEPSEEK, &|text| words(&deepseek, text));
}
