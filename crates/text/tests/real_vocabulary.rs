//! SmolLM2's own vocabulary, 49,152 tokens, out of the model file that the project's set-up fetches.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test's helpers may do what its tests may")]

mod common;

use std::sync::OnceLock;

use forebay_text::{
    Backend, ChatTemplate, Conversation, Detokenizer, GgufVocabulary, Message, Preference, Source, Tokenizer,
};
use proptest::prelude::*;

fn vocabulary() -> Option<&'static GgufVocabulary> {
    static VOCABULARY: OnceLock<Option<GgufVocabulary>> = OnceLock::new();
    let read = || common::real_model().map(|path| common::read_vocabulary(&path).expect("a readable GGUF"));
    VOCABULARY.get_or_init(read).as_ref()
}

/// The tokenizer by its fast and by its reference back end.
fn tokenizers() -> Option<&'static (Tokenizer, Tokenizer)> {
    static TOKENIZERS: OnceLock<Option<(Tokenizer, Tokenizer)>> = OnceLock::new();
    let load = |vocabulary: &GgufVocabulary| {
        let reference = Tokenizer::load(Source::Gguf(vocabulary.clone()), Preference::Reference).unwrap();
        (Tokenizer::from_gguf_parts(vocabulary.clone()).unwrap(), reference)
    };
    TOKENIZERS.get_or_init(|| vocabulary().map(load)).as_ref()
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let mut tokens = Vec::new();
    tokenizer.encode(text, &mut tokens).unwrap();
    tokens
}

#[test]
fn the_fast_back_end_is_exact() {
    let Some((fast, reference)) = tokenizers() else { return };
    assert_eq!((fast.backend(), reference.backend()), (Backend::Bpe, Backend::Tokenizers));
    assert_eq!(fast.fingerprint(), reference.fingerprint());
    assert_eq!((fast.vocab_size(), fast.bos(), fast.eos()), (49_152, Some(1), &[2][..]));
    assert_eq!(fast.special_id("<|im_end|>"), Some(2));
    assert!(fast.plain_tokens().len() > 45_000, "{}", fast.plain_tokens().len());
}

#[test]
fn known_texts_have_their_known_ids() {
    let Some((fast, _)) = tokenizers() else { return };
    // From Hugging Face's tokenizers over HuggingFaceTB/SmolLM2-135M-Instruct's rules.
    assert_eq!(encode(fast, "Hello, world!"), [19556, 28, 905, 17]);
    assert_eq!(
        encode(fast, "<|im_start|>user\nHi 42<|im_end|>\n"),
        [1, 4093, 198, 26843, 216, 36, 34, 2, 198]
    );
}

#[test]
fn its_own_chat_template_renders() {
    let Some((fast, _)) = tokenizers() else { return };
    let template = ChatTemplate::of(fast).unwrap().expect("the model has a template");
    let messages = [Message::new("user", "Hi")];
    let conversation =
        Conversation { messages: &messages, add_generation_prompt: true, ..Conversation::default() };
    let prompt = template.render(&conversation).unwrap();
    assert_eq!(
        prompt,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(
        fast.decode(&encode(fast, &prompt)),
        prompt.replace("<|im_start|>", "").replace("<|im_end|>", "")
    );
}

/// The bytes of `text` for which there is a token: SmolLM2 has none for 21 bytes, some of them control characters.
fn known_bytes(tokenizer: &Tokenizer, text: &str) -> Vec<u8> {
    static KNOWN: OnceLock<Vec<bool>> = OnceLock::new();
    let known = KNOWN.get_or_init(|| {
        let mut known = vec![false; 256];
        for token in 0..49_152 {
            if let [byte] = tokenizer.token_bytes(token) {
                known[usize::from(*byte)] = true;
            }
        }
        known
    });
    text.bytes().filter(|&byte| known[usize::from(byte)]).collect()
}

#[test]
fn bytes_without_a_token_are_left_out_as_in_the_reference() {
    let Some((fast, reference)) = tokenizers() else { return };
    for text in ["t\u{4}he 5\u{4}5<|im_end|>\u{6}", "\u{80000}", "\u{4}", " \u{4} th\u{13}\u{14}e"] {
        assert_eq!(encode(fast, text), encode(reference, text), "{text:?}");
        assert_ne!(known_bytes(fast, text).len(), text.len());
    }
}

/// Text as people and programs write it, and text as nobody does.
fn any_text() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "the",
        " of",
        " Rust",
        "tokenizer",
        " naïve",
        " слово",
        "漢字",
        "を",
        "한국",
        "العربية",
        " 2024",
        "3.14",
        "\n\n",
        "    ",
        "'s",
        "’",
        "<|im_end|>",
        "<file_sep>",
        "<|",
        "fn main() {",
        "});\n",
        "😀",
        "e\u{301}",
        "½",
        "\t",
    ]);
    let piece = prop_oneof![
        4 => word.prop_map(str::to_owned),
        2 => any::<char>().prop_map(String::from),
        1 => "[\\x00-\\x1f\\x7f]{1,2}",
        2 => "[a-zA-Z]{1,12}",
        1 => "[0-9]{1,6}",
        1 => "\\s{1,4}",
        1 => "\\PC{1,8}",
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_back_ends_agree_on_any_text(text in any_text()) {
        let Some((fast, reference)) = tokenizers() else { return Ok(()) };
        prop_assert_eq!(encode(fast, &text), encode(reference, &text));
        let (mut plain, mut exact) = (Vec::new(), Vec::new());
        fast.encode_plain(&text, &mut plain).unwrap();
        reference.encode_plain(&text, &mut exact).unwrap();
        prop_assert_eq!(&plain, &exact);
        let known = known_bytes(fast, &text);
        prop_assert_eq!(fast.decode(&plain), String::from_utf8_lossy(&known));
    }

    #[test]
    fn streamed_text_is_the_text_of_the_whole(tokens in prop::collection::vec(0_u32..49_152, 0..60)) {
        let Some((fast, _)) = tokenizers() else { return Ok(()) };
        let mut detokenizer = Detokenizer::new(fast.clone());
        let (mut text, mut bytes) = (String::new(), Vec::new());
        for &token in &tokens {
            detokenizer.push(token, &mut text);
            if !fast.is_special(token) { bytes.extend_from_slice(fast.token_bytes(token)); }
        }
        detokenizer.finish(&mut text);
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
    }
}
