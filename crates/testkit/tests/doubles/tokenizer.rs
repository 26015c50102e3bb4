//! The doubles' tokenizer as others load it.

use forebay_testkit::tokenizer;
use forebay_text::Tokenizer;

const TEXTS: [&str; 4] =
    ["plain words", "<|im_start|>user\nÀ la carte: 3 €<|im_end|>\n", "\u{0}\t\r\n \u{7F}", "日本語 🦀"];

fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let mut tokens = Vec::new();
    tokenizer.encode(text, &mut tokens).unwrap();
    tokens
}

#[test]
fn the_built_in_byte_tokenizer_is_the_same() {
    for text in TEXTS {
        assert_eq!(tokenizer::encode(text), encode(&Tokenizer::bytes(), text), "{text:?}");
    }
}

#[test]
fn the_model_folder_loads_as_the_same_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    tokenizer::write_model_dir(folder.path(), 4096).unwrap();
    let loaded = Tokenizer::from_json_file(folder.path()).unwrap();
    for text in TEXTS {
        let tokens = tokenizer::encode(text);
        assert_eq!(tokens, encode(&loaded, text), "{text:?}");
        assert_eq!(tokenizer::decode(&tokens, true), loaded.decode(&tokens), "{text:?}");
    }
    assert_eq!(loaded.vocab_size(), tokenizer::VOCABULARY);
    assert!(loaded.eos().contains(&tokenizer::IM_END));
    assert_eq!(loaded.chat_template(), Some(tokenizer::CHAT_TEMPLATE));
}
