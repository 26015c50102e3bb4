//! Tests on a vocabulary small enough to train here, so that they need no file. The real one is in
//! `tests/real_vocabulary.rs`.

use std::{collections::BTreeMap, fs};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// What the tiny vocabulary is trained on.
const TRAINING: &str = "the then there these other mother weather her here hello held world word work low lower \
    lowest new newer newest wide wider widest 12 123 2024 naïve café слово слова 漢字 漢文 😀😀 let it's it'll we'll";

/// GPT-2's alphabet, the other way round than in `vocabulary`.
fn letter(byte: u8) -> char {
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(&byte) {
        return char::from(byte);
    }
    let index = (0..byte).filter(|other| !printable(other)).count();
    char::from_u32(0x100 + u32::try_from(index).unwrap()).unwrap()
}

/// Byte-pair encoding by its definition: merge the most frequent pair (the first of equals), again and again.
fn train(merges: usize) -> (Vec<String>, Vec<String>) {
    let mut words: Vec<Vec<String>> = TRAINING
        .split(' ')
        .map(|word| format!(" {word}").bytes().map(|byte| letter(byte).to_string()).collect())
        .collect();
    let mut tokens: Vec<String> = (0..=255).map(|byte| letter(byte).to_string()).collect();
    let mut learned = Vec::new();
    for _ in 0..merges {
        let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
        for pair in words.iter().flat_map(|word| word.windows(2)) {
            *counts.entry((pair[0].clone(), pair[1].clone())).or_default() += 1;
        }
        let Some(((left, right), _)) = counts.into_iter().max_by(|a, b| a.1.cmp(&b.1).then(b.0.cmp(&a.0)))
        else {
            break;
        };
        for word in &mut words {
            let mut at = 0;
            while at + 1 < word.len() {
                if word[at] == left && word[at + 1] == right {
                    word[at] += &right;
                    word.remove(at + 1);
                }
                at += 1;
            }
        }
        let merged = format!("{left}{right}");
        if !tokens.contains(&merged) {
            tokens.push(merged);
        }
        learned.push(format!("{left} {right}"));
    }
    (tokens, learned)
}

pub(super) fn tiny() -> GgufVocabulary {
    let (mut tokens, merges) = train(120);
    let mut token_types = vec![1; tokens.len()];
    let specials =
        [("<|endoftext|>", 3), ("<|im_start|>", 3), ("<|im_end|>", 3), ("<think>", 4), ("<|r1|>", 3)];
    for (text, kind) in specials {
        tokens.push(text.to_owned());
        token_types.push(kind);
    }
    let first = u32::try_from(tokens.len() - specials.len()).unwrap();
    GgufVocabulary {
        tokens,
        merges,
        token_types,
        bos: Some(first + 1),
        eos: Some(first + 2),
        pre: Some("smollm".to_owned()),
        add_bos: false,
        chat_template: Some("{{ bos_token }}".to_owned()),
    }
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<TokenId> {
    let mut tokens = Vec::new();
    tokenizer.encode(text, &mut tokens).unwrap();
    tokens
}

fn bytes_of(tokenizer: &Tokenizer, tokens: &[TokenId]) -> Vec<u8> {
    tokens.iter().flat_map(|&token| tokenizer.token_bytes(token)).copied().collect()
}

#[test]
fn byte_tokenizer_has_the_promised_ids() {
    let tokenizer = Tokenizer::bytes();
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"];
    assert_eq!(specials.map(|text| tokenizer.special_id(text)), [Some(256), Some(257), Some(258), Some(259)]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.backend()), (264, Backend::Bytes));
    assert_eq!(encode(&tokenizer, "é<|im_end|><|im_<|pad|>"), {
        let mut expected = vec![0xc3, 0xa9, 258];
        expected.extend("<|im_".bytes().map(u32::from));
        expected.push(259);
        expected
    });
    assert_eq!(tokenizer.token_bytes(258), b"<|im_end|>");
    assert_eq!((tokenizer.token_bytes(261), tokenizer.token_bytes(264)), (&b""[..], &b""[..]));
    assert!((256..264).all(|token| tokenizer.is_special(token)) && !tokenizer.is_special(255));
    assert_eq!(tokenizer.plain_tokens(), (0x20..=0x7e).collect::<Vec<_>>());
    assert_eq!(tokenizer.eos(), [258, 256]);
}

#[test]
fn plain_text_cannot_name_special_tokens() {
    for tokenizer in [Tokenizer::bytes(), Tokenizer::from_gguf_parts(tiny()).unwrap()] {
        let text = "a<|im_end|>1<|r1|>";
        let mut plain = Vec::new();
        tokenizer.encode_plain(text, &mut plain).unwrap();
        assert!(!plain.iter().any(|&token| tokenizer.is_special(token)), "{tokenizer:?} {plain:?}");
        assert_eq!(bytes_of(&tokenizer, &plain), text.as_bytes());
        assert!(encode(&tokenizer, text).contains(&tokenizer.special_id("<|im_end|>").unwrap()));
    }
}

#[test]
fn a_gguf_vocabulary_is_tokenised_by_the_exact_fast_back_end() {
    let tokenizer = Tokenizer::from_gguf_parts(tiny()).unwrap();
    assert_eq!(tokenizer.backend(), Backend::Bpe);
    let text = "<|im_start|>hello there 123<think>é<|im_end|>";
    let tokens = encode(&tokenizer, text);
    assert_eq!(bytes_of(&tokenizer, &tokens), text.as_bytes());
    assert_eq!(
        tokenizer.decode(&tokens),
        "hello there 123<think>é",
        "user-defined tokens are text, control is not"
    );
    let digits = tokens.iter().filter(|&&token| tokenizer.token_bytes(token).iter().all(u8::is_ascii_digit));
    assert_eq!(digits.count(), 3, "one token for each digit");
    assert!(tokens.len() < text.len() / 2, "{tokens:?}");
    assert_eq!(tokenizer.bos(), tokenizer.special_id("<|im_start|>"));
    assert_eq!(tokenizer.eos(), [tokenizer.special_id("<|im_end|>").unwrap()]);
    assert_eq!(tokenizer.chat_template(), Some("{{ bos_token }}"));
}

#[test]
fn bos_is_added_to_bare_prompts_only_where_the_model_says_so() {
    let with_bos = Tokenizer::from_gguf_parts(GgufVocabulary { add_bos: true, ..tiny() }).unwrap();
    let without = Tokenizer::from_gguf_parts(tiny()).unwrap();
    assert_eq!(with_bos.backend(), Backend::Bpe);
    for text in ["the 12 words", ""] {
        let completion = |tokenizer: &Tokenizer| {
            let mut tokens = Vec::new();
            tokenizer.encode_completion(text, &mut tokens).unwrap();
            tokens
        };
        assert_eq!(completion(&without), encode(&without, text));
        assert_eq!(encode(&with_bos, text), encode(&without, text));
        assert_eq!(completion(&with_bos), [vec![with_bos.bos().unwrap()], encode(&without, text)].concat());
    }
}

#[test]
fn encode_appends() {
    let tokenizer = Tokenizer::from_gguf_parts(tiny()).unwrap();
    let mut tokens = vec![7];
    tokenizer.encode("the", &mut tokens).unwrap();
    tokenizer.encode("1", &mut tokens).unwrap();
    assert_eq!(tokens, [vec![7], encode(&tokenizer, "the"), encode(&tokenizer, "1")].concat());
}

/// The definition of the tiny vocabulary, changed by `change`.
fn definition(change: impl FnOnce(&mut Value)) -> (Value, String, Vocabulary) {
    let mut value = tiny().into_definition().unwrap().json.parse().unwrap();
    change(&mut value);
    let vocabulary = Vocabulary::from_json(&value).unwrap();
    let text = value.to_string();
    (value, text, vocabulary)
}

#[test]
fn a_difference_between_the_back_ends_selects_the_reference() {
    let (value, text, vocabulary) = definition(|_| ());
    assert!(matches!(verify::choose(&value, &text, &vocabulary).unwrap(), Encoder::Fast(_)));

    // A fast encoder with other merges, another split, or one special token less is not exact.
    let merges = |value: &mut Value| value["model"]["merges"].as_array_mut().unwrap().reverse();
    let split = |value: &mut Value| value["pre_tokenizer"] = value["decoder"].clone();
    let special = |value: &mut Value| drop(value["added_tokens"].as_array_mut().unwrap().pop());
    for (name, other) in
        [("merges", definition(merges)), ("split", definition(split)), ("special", definition(special))]
    {
        let chosen = verify::choose(&other.0, &text, &vocabulary).unwrap();
        assert!(matches!(chosen, Encoder::Reference(_)), "{name}");
    }

    // One that cannot be loaded is not needed either.
    let chosen = verify::choose(&json!({"model": 1}), &text, &vocabulary).unwrap();
    assert!(matches!(chosen, Encoder::Reference(_)));
}

#[test]
fn a_difference_names_the_text() {
    let (_, text, _) = definition(|value| value["model"]["merges"].as_array_mut().unwrap().clear());
    let (exact, ..) = definition(|_| ());
    let fast = Fast::load(&exact).unwrap();
    let reference = Reference::load(&text).unwrap();
    let samples = ["~".to_owned(), "the".to_owned()];
    let difference = verify::first_difference(&fast, &reference, &samples).unwrap().to_string();
    assert!(difference.starts_with("\"the\" (Chat) is ["), "{difference}");
}

#[test]
fn lengths_from_training_do_not_cut_prompts() {
    let (value, text, vocabulary) = definition(|value| {
        value["truncation"] =
            json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        value["padding"] = json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    });
    let reference = Reference::load(&text).unwrap();
    let Encoder::Fast(fast) = verify::choose(&value, &text, &vocabulary).unwrap() else {
        panic!("not exact")
    };
    let sample = "~ ~ ~ ~ ~ ~".to_owned();
    let mut tokens = Vec::new();
    fast.encode(Mode::Chat, &sample, &mut tokens);
    assert_eq!(tokens.len(), 11);
    assert!(verify::first_difference(&fast, &reference, &[sample]).is_none());
}

#[test]
fn a_gguf_that_cannot_be_trusted_is_refused() {
    let size = tiny().tokens.len();
    let check = |change: fn(&mut GgufVocabulary), expected: &str| {
        let mut vocabulary = tiny();
        change(&mut vocabulary);
        assert_eq!(Tokenizer::from_gguf_parts(vocabulary).unwrap_err().to_string(), expected);
    };
    check(
        |v| v.pre = Some("llama-bpe".to_owned()),
        "the GGUF file's pre-tokenizer is llama-bpe; known are gpt-2, smollm; load the model's tokenizer.json instead",
    );
    check(
        |v| v.pre = None,
        "the GGUF file's pre-tokenizer is not given; known are gpt-2, smollm; load the model's tokenizer.json instead",
    );
    check(|v| v.tokens.clear(), "the GGUF file's vocabulary is inconsistent: it has no tokens");
    check(
        |v| v.merges.clear(),
        "the GGUF file's vocabulary is inconsistent: it has no merges, so it is not byte-level BPE",
    );
    check(
        |v| v.token_types = vec![1],
        &format!("the GGUF file's vocabulary is inconsistent: {size} tokens have 1 types"),
    );
    check(
        |v| v.eos = Some(9999),
        &format!("the GGUF file's vocabulary is inconsistent: EOS is token 9999 of {size}"),
    );
    check(
        |v| v.tokens[1] = v.tokens[0].clone(),
        "the GGUF file's vocabulary is inconsistent: token \"Ā\" occurs twice",
    );
    check(|v| v.merges.push("the nope".to_owned()), "the tokenizer's definition was refused");
}

#[test]
fn a_folder_is_loaded_with_its_neighbours() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    let (_, text, _) = definition(|value| drop(value["added_tokens"].as_array_mut().unwrap().pop()));
    write("tokenizer.json", &text);
    let alone = Tokenizer::from_json_file(&folder.path().join("tokenizer.json")).unwrap();
    assert_eq!((alone.bos(), alone.eos(), alone.chat_template()), (None, &[][..], None));
    assert_eq!(alone.special_id("<|r1|>"), None);

    let size = tiny().tokens.len();
    let [end_of_text, im_start, im_end, r1] =
        [5, 4, 3, 1].map(|from_end| u32::try_from(size - from_end).unwrap());
    let config = json!({
        "bos_token": {"__type": "AddedToken", "content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "from config"}],
        "added_tokens_decoder": {r1.to_string(): {"content": "<|r1|>", "special": true, "normalized": false,
            "lstrip": false, "rstrip": false, "single_word": false}},
    });
    write("tokenizer_config.json", &config.to_string());
    write("generation_config.json", &json!({"eos_token_id": [end_of_text, im_end]}).to_string());
    let tokenizer = Tokenizer::from_json_file(folder.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(im_start), &[im_end, end_of_text][..]));
    assert_eq!(tokenizer.chat_template(), Some("from config"));
    assert_eq!((tokenizer.special_id("<|r1|>"), tokenizer.backend()), (Some(r1), Backend::Bpe));
    assert_eq!(encode(&tokenizer, "<|r1|>"), [r1]);

    write("chat_template.jinja", "from its own file");
    let tokenizer = Tokenizer::from_json_file(folder.path()).unwrap();
    assert_eq!(tokenizer.chat_template(), Some("from its own file"));
}

#[test]
fn a_broken_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let error = || Tokenizer::from_json_file(&path).unwrap_err().to_string();
    assert_eq!(error(), format!("cannot read {}", path.display()));
    fs::write(&path, "{").unwrap();
    assert_eq!(error(), format!("{} is not valid", path.display()));
    fs::write(&path, r#"{"decoder": {"type": "WordPiece"}}"#).unwrap();
    assert!(error().contains("the decoder WordPiece are not supported"), "{}", error());
    fs::write(&path, r#"{"decoder": {"type": "ByteLevel"}, "model": {"vocab": 3}}"#).unwrap();
    assert!(error().contains("model.vocab must be an object"), "{}", error());
    fs::write(&path, r#"{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": 4000000000}}}"#).unwrap();
    assert!(error().contains("must be a token id"), "{}", error());
}

#[test]
fn sentencepiece_tokens_are_bytes_and_spaces() {
    let json = json!({
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"vocab": {"<0x0A>": 0, "▁the": 1, "<0xE2>": 2, "<0xzz>": 3}},
        "added_tokens": [{"id": 4, "content": "<s>▁", "special": true}],
    });
    let vocabulary = Vocabulary::from_json(&json).unwrap();
    let bytes: Vec<&[u8]> = (0..5).map(|token| vocabulary.bytes(token)).collect();
    assert_eq!(bytes, [&b"\n"[..], b" the", b"\xe2", b"<0xzz>", "<s>▁".as_bytes()]);
    assert_eq!(vocabulary.plain(), [1, 3]);
}

#[test]
fn the_fingerprint_follows_meaning_and_not_format() {
    let fingerprint = |change: fn(&mut Value)| {
        let (value, _, vocabulary) = definition(change);
        fingerprint::of_json(&value, &vocabulary)
    };
    let same = fingerprint(|_| ());
    assert_eq!(same, Tokenizer::from_gguf_parts(tiny()).unwrap().fingerprint());
    assert_eq!(same.to_string().len(), 32);
    assert_eq!(
        same,
        fingerprint(|value| {
            for merge in value["model"]["merges"].as_array_mut().unwrap() {
                let (left, right) = merge.as_str().unwrap().split_once(' ').unwrap();
                *merge = json!([left, right]);
            }
        }),
        "merges written as pairs"
    );
    assert_ne!(same, fingerprint(|value| value["model"]["merges"].as_array_mut().unwrap().swap(3, 4)));
    assert_ne!(same, fingerprint(|value| value["pre_tokenizer"] = value["decoder"].clone()));
    assert_ne!(same, fingerprint(|value| value["added_tokens"][0]["special"] = json!(false)));
    assert_ne!(same, Tokenizer::bytes().fingerprint());
}

#[test]
fn plain_tokens_joined_in_any_order_are_text() {
    let tokenizer = Tokenizer::from_gguf_parts(tiny()).unwrap();
    let plain = tokenizer.plain_tokens();
    assert!(plain.len() > 150, "{}", plain.len());
    assert!(plain.iter().all(|&token| tokenizer.decode(&[token]).as_bytes() == tokenizer.token_bytes(token)));
    let the = encode(&tokenizer, "the");
    assert!(plain.contains(&the[0]));
    assert!(!plain.contains(&tokenizer.special_id("<|im_end|>").unwrap()));
}

#[test]
fn the_corpus_is_small_and_holds_every_special_token() {
    let (.., vocabulary) = definition(|_| ());
    let samples = corpus::samples(&vocabulary);
    let bytes: usize = samples.iter().map(String::len).sum();
    assert!((8_000..40_000).contains(&bytes), "{bytes}");
    for token in ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "<|r1|>", " weather"] {
        assert!(samples.iter().any(|text| text.contains(token)), "{token}");
    }
    assert_eq!(samples, corpus::samples(&vocabulary), "the same at every load");
}

/// Text in which the vocabulary's words, digits of all scripts, white space and special tokens meet.
fn mixed_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => any::<char>().prop_map(String::from),
        2 => "\\PC{1,6}",
        2 => "[ \\t\\n\u{a0}]{1,3}",
        2 => "[0-9²½٣Ⅳ]{1,3}",
        3 => prop::sample::select(TRAINING.split(' ').collect::<Vec<_>>()).prop_map(str::to_owned),
        1 => prop::sample::select(vec!["<|im_end|>", "<think>", "<|r1|>", "<|", "'s", " '"]).prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..20).prop_map(|pieces| pieces.concat())
}

thread_local! {
    static PAIR: (Tokenizer, Tokenizer) = (
        Tokenizer::from_gguf_parts(tiny()).unwrap(),
        Tokenizer::load(Source::Gguf(tiny()), Preference::Reference).unwrap(),
    );
}

/// A vocabulary without tokens for some bytes, which `tokenizers` drops.
#[test]
fn bytes_without_a_token_are_left_out_by_both_back_ends() {
    let mut vocabulary = tiny();
    for byte in [0x04, b'~', 0xf2, b'7'] {
        let index = usize::from(byte);
        vocabulary.tokens[index] = format!("<unused{byte}>");
    }
    let reference = Tokenizer::load(Source::Gguf(vocabulary.clone()), Preference::Reference).unwrap();
    let fast = Tokenizer::from_gguf_parts(vocabulary).unwrap();
    assert_eq!(fast.backend(), Backend::Bpe);
    for text in ["a~b", "the~the 17~7<|r1|>\u{4}", "\u{80000}", "~", "t\u{4}he"] {
        assert_eq!(encode(&fast, text), encode(&reference, text), "{text:?}");
    }
    assert_eq!(fast.decode(&encode(&fast, "a~7b")), "ab");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn both_back_ends_give_the_same_ids(text in mixed_text()) {
        PAIR.with(|(fast, reference)| {
            assert_eq!((fast.backend(), reference.backend()), (Backend::Bpe, Backend::Tokenizers));
            for mode in [Mode::Chat, Mode::Completion, Mode::Plain] {
                let (mut ids, mut exact) = (Vec::new(), Vec::new());
                fast.encode_as(mode, &text, &mut ids).unwrap();
                reference.encode_as(mode, &text, &mut exact).unwrap();
                prop_assert_eq!(ids, exact);
            }
            Ok(())
        })?;
    }

    #[test]
    fn decoding_gives_back_what_was_encoded(text in mixed_text()) {
        PAIR.with(|(fast, _)| {
            for tokenizer in [fast, &Tokenizer::bytes()] {
                let tokens = encode(tokenizer, &text);
                prop_assert_eq!(bytes_of(tokenizer, &tokens), text.as_bytes());
                let mut plain = Vec::new();
                tokenizer.encode_plain(&text, &mut plain).unwrap();
                prop_assert_eq!(tokenizer.decode(&plain), text.as_str());
            }
            Ok(())
        })?;
    }
}
