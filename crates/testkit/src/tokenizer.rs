//! The doubles' tokenizer: one token a byte, and a few specials.
//!
//! Ids 0 to 255 are bytes, 256 `<|endoftext|>`, 257 `<|im_start|>`, 258 `<|im_end|>`, 259 `<|pad|>`, 260 to 263
//! reserved: the built-in byte tokenizer of `forebay-text`. [`write_model_dir`] writes the same one as a model folder
//! (`tokenizer.json`, chat template, `config.json`), for whoever loads tokenizers from files.

use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};

/// A token id.
pub type Token = u32;

/// `<|endoftext|>`.
pub const END_OF_TEXT: Token = 256;
/// `<|im_start|>`, which opens a message.
pub const IM_START: Token = 257;
/// `<|im_end|>`, which closes a message and an answer.
pub const IM_END: Token = 258;
/// Tokens in the vocabulary.
pub const VOCABULARY: usize = 264;

const SPECIALS: [(&str, Token); 8] = [
    ("<|endoftext|>", END_OF_TEXT),
    ("<|im_start|>", IM_START),
    ("<|im_end|>", IM_END),
    ("<|pad|>", 259),
    ("<|reserved_260|>", 260),
    ("<|reserved_261|>", 261),
    ("<|reserved_262|>", 262),
    ("<|reserved_263|>", 263),
];

/// ChatML, as Jinja, in the form that `tokenizer_config.json` holds it.
pub const CHAT_TEMPLATE: &str = "{%- for message in messages -%}\
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
    {%- endfor -%}\
    {%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// The tokens of `text`. The names of special tokens in it become those tokens, as in engines.
pub fn encode(text: &str) -> Vec<Token> {
    let mut tokens = Vec::with_capacity(text.len());
    let mut rest = text;
    while !rest.is_empty() {
        let special = SPECIALS.iter().take(4).find(|(name, _)| rest.starts_with(name));
        if let Some((name, token)) = special {
            tokens.push(*token);
            rest = &rest[name.len()..];
        } else {
            let first = rest.chars().next().expect("rest is not empty").len_utf8();
            tokens.extend(rest.as_bytes()[..first].iter().map(|byte| Token::from(*byte)));
            rest = &rest[first..];
        }
    }
    tokens
}

/// The text of `tokens`; special tokens are left out if `skip_special`. What is no UTF-8 becomes U+FFFD.
pub fn decode(tokens: &[Token], skip_special: bool) -> String {
    let mut bytes = Vec::with_capacity(tokens.len());
    for token in tokens {
        push_bytes(*token, skip_special, &mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A token as `/tokenize` with `return_token_strs` names it.
pub fn name(token: Token) -> String {
    match u8::try_from(token) {
        Ok(byte) => byte_level(byte).to_string(),
        Err(_) => special_name(token).unwrap_or_default().to_owned(),
    }
}

/// Whether the id is in the vocabulary.
pub fn known(token: Token) -> bool {
    (token as usize) < VOCABULARY
}

/// The prompt of a conversation: ChatML, as [`CHAT_TEMPLATE`] renders it. Takes (role, content) pairs.
pub fn render_chat(messages: &[(String, String)], add_generation_prompt: bool) -> String {
    let mut text: String =
        messages.iter().map(|(role, content)| format!("<|im_start|>{role}\n{content}<|im_end|>\n")).collect();
    if add_generation_prompt {
        text.push_str("<|im_start|>assistant\n");
    }
    text
}

/// Text from tokens that come one by one: a character is given out when its last byte has come.
#[derive(Debug, Default)]
pub(crate) struct Detokenizer {
    held: Vec<u8>,
}

impl Detokenizer {
    /// The text that `token` completes, perhaps none.
    pub(crate) fn push(&mut self, token: Token, skip_special: bool) -> String {
        push_bytes(token, skip_special, &mut self.held);
        let (complete, broken) = match std::str::from_utf8(&self.held) {
            Ok(text) => (text.len(), false),
            Err(error) => (error.valid_up_to(), error.error_len().is_some()),
        };
        if broken {
            return self.finish();
        }
        let text = String::from_utf8_lossy(&self.held[..complete]).into_owned();
        self.held.drain(..complete);
        text
    }

    /// What is left at the end, with U+FFFD for a character that was never completed.
    pub(crate) fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text
    }
}

/// Writes a folder that tokenizer libraries load as this tokenizer: `tokenizer.json` (a byte-level BPE without merges),
/// `tokenizer_config.json` with the chat template, `config.json` and `generation_config.json`. There are no weights.
///
/// # Errors
/// If a file cannot be written.
pub fn write_model_dir(folder: &Path, max_model_len: usize) -> io::Result<()> {
    let mut vocabulary: Map<String, Value> =
        (0..=255u8).map(|byte| (byte_level(byte).to_string(), Value::from(byte))).collect();
    vocabulary.extend(SPECIALS.iter().map(|(name, token)| ((*name).to_owned(), Value::from(*token))));
    let added = SPECIALS.iter().map(|(name, token)| {
        json!({"id": token, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocabulary, "merges": []},
    });
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|pad|>",
        "model_max_length": max_model_len, "chat_template": CHAT_TEMPLATE, "add_bos_token": false,
        "clean_up_tokenization_spaces": false,
    });
    let model = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "max_position_embeddings": max_model_len, "eos_token_id": IM_END, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "torch_dtype": "float32",
    });
    let generation = json!({"eos_token_id": [IM_END, END_OF_TEXT], "pad_token_id": 259});
    let files = [
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
        ("config.json", model),
        ("generation_config.json", generation),
    ];
    for (name, content) in files {
        std::fs::write(folder.join(name), serde_json::to_vec_pretty(&content)?)?;
    }
    Ok(())
}

fn push_bytes(token: Token, skip_special: bool, out: &mut Vec<u8>) {
    match u8::try_from(token) {
        Ok(byte) => out.push(byte),
        Err(_) if skip_special => {}
        Err(_) => out.extend(special_name(token).unwrap_or_default().as_bytes()),
    }
}

fn special_name(token: Token) -> Option<&'static str> {
    SPECIALS.iter().find(|(_, id)| *id == token).map(|(name, _)| *name)
}

/// The character that stands for a byte in a byte-level vocabulary: printable bytes stand for themselves, the others
/// for characters from U+0100 on, in order.
fn byte_level(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let index = (0..byte).filter(|other| !printable(*other)).count() as u32;
    char::from_u32(256 + index).expect("U+0100 and on are characters")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_and_specials_are_one_token() {
        let text = "<|im_start|>user\nÀ la carte: 3 €<|im_end|>\n";
        let tokens = encode(text);
        assert_eq!(tokens.first(), Some(&IM_START));
        assert_eq!(tokens.iter().filter(|token| **token >= 256).count(), 2);
        assert_eq!(decode(&tokens, false), text);
        assert_eq!(decode(&tokens, true), "user\nÀ la carte: 3 €\n");
    }

    #[test]
    fn a_character_appears_with_its_last_byte() {
        let mut text = Detokenizer::default();
        let pieces: Vec<String> = [0xE2, 0x82, 0xAC, 97, 0xC3].map(|token| text.push(token, true)).to_vec();
        assert_eq!(pieces, ["", "", "€", "a", ""]);
        assert_eq!(text.finish(), "\u{FFFD}");
    }

    #[test]
    fn every_byte_has_its_own_name() {
        let names: std::collections::BTreeSet<char> = (0..=255).map(byte_level).collect();
        assert_eq!(names.len(), 256);
        assert_eq!((byte_level(b' '), byte_level(b'\n'), byte_level(b'A')), ('Ġ', 'Ċ', 'A'));
    }
}
