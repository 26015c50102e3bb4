use std::io::Cursor;

use proptest::prelude::*;

use super::*;
use crate::{ChunkInput, Executor, Logits, VecPool, gguf::tests::Builder, hash::SplitMix};

const HIDDEN: u64 = 64;
const FFN: u64 = 96;
const VOCAB: u64 = 40;
const F32: u32 = 0;
const F16: u32 = 1;
const Q4_0: u32 = 2;
const Q4_1: u32 = 3;
const Q8_0: u32 = 8;
const Q6_K: u32 = 14;

/// Random numbers of an encoding: any bytes are numbers, but scales should be small.
fn tensor(random: &mut SplitMix, kind: u32, count: u64) -> Vec<u8> {
    let byte = |random: &mut SplitMix| random.next() as u8;
    let small_half = |random: &mut SplitMix| (0x2000 + (random.next() % 0x400) as u16).to_le_bytes();
    match kind {
        F32 => (0..count).flat_map(|_| ((byte(random) as f32 - 128.0) / 128.0).to_le_bytes()).collect(),
        F16 => (0..count).flat_map(|_| small_half(random)).collect(),
        Q4_1 => (0..count / 32)
            .flat_map(|_| {
                let mut block = [small_half(random), small_half(random)].concat();
                block.extend((0..16).map(|_| byte(random)));
                block
            })
            .collect(),
        _ => (0..count / 32)
            .flat_map(|_| {
                let mut block = small_half(random).to_vec();
                block.extend((0..if kind == Q4_0 { 16 } else { 32 }).map(|_| byte(random)));
                block
            })
            .collect(),
    }
}

/// A llama of two layers whose matrices are written as `kind`.
fn llama(kind: u32) -> Builder {
    let tokens: Vec<String> = (0..VOCAB).map(|id| format!("t{id}")).collect();
    let mut random = SplitMix::new(1);
    let mut file = Builder::default()
        .text("general.architecture", "llama")
        .number("llama.block_count", 2)
        .number("llama.context_length", 256)
        .number("llama.embedding_length", HIDDEN as u32)
        .number("llama.feed_forward_length", FFN as u32)
        .number("llama.attention.head_count", 4)
        .number("llama.attention.head_count_kv", 2)
        .float("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .texts("tokenizer.ggml.tokens", &tokens)
        .number("tokenizer.ggml.eos_token_id", 2);
    let mut add = |name: &str, shape: &[u64], kind: u32| {
        let bytes = tensor(&mut random, kind, shape.iter().product());
        file = std::mem::take(&mut file).tensor(name, shape, kind, bytes);
    };
    add("token_embd.weight", &[HIDDEN, VOCAB], Q8_0);
    for layer in 0..2 {
        let mut part =
            |part: &str, shape: &[u64], kind| add(&format!("blk.{layer}.{part}.weight"), shape, kind);
        part("attn_norm", &[HIDDEN], F32);
        part("attn_q", &[HIDDEN, 64], kind);
        part("attn_k", &[HIDDEN, 32], kind);
        part("attn_v", &[HIDDEN, 32], kind);
        part("attn_output", &[64, HIDDEN], kind);
        part("ffn_norm", &[HIDDEN], F16);
        part("ffn_gate", &[HIDDEN, FFN], kind);
        part("ffn_up", &[HIDDEN, FFN], kind);
        part("ffn_down", &[FFN, HIDDEN], kind);
    }
    add("output_norm.weight", &[HIDDEN], F32);
    file
}

fn read_bytes(bytes: &[u8]) -> Result<Weights, ModelError> {
    read(&mut Cursor::new(bytes), bytes.len() as u64, Path::new("dir/tiny-llama.Q4_1.gguf"), &mut |_| ())
}

#[test]
fn a_model_loads_and_computes_in_every_encoding() {
    for kind in [F32, F16, Q4_0, Q4_1, Q8_0] {
        let weights = std::sync::Arc::new(read_bytes(&llama(kind).build()).expect("sound"));
        assert_eq!(weights.config().name, "tiny-llama");
        assert_eq!((weights.config().head_dim, weights.config().vocab), (16, 40));
        let mut pool = VecPool::new(1, weights.kv_block_bytes(16), 16);
        let mut logits = Logits::new();
        let chunk = ChunkInput { start: 0, tokens: &[3, 4, 5], blocks: &[0], want_logits: true };
        Executor::new(weights, 16).execute(&mut pool, &[chunk], &mut logits);
        let row = logits.row(0);
        assert!(row.iter().all(|x| x.is_finite()) && row.iter().any(|x| *x != row[0]), "{kind}: {row:?}");
    }
}

#[test]
fn the_fingerprint_is_of_the_weights() {
    let fingerprint = |builder: &Builder| read_bytes(&builder.build()).expect("sound").fingerprint();
    let plain = llama(Q4_1);
    assert_eq!(fingerprint(&plain), fingerprint(&llama(Q4_1)));
    assert_eq!(fingerprint(&plain), fingerprint(&plain.clone().text("general.name", "other")));
    assert_ne!(fingerprint(&plain), fingerprint(&llama(Q8_0)));
    let norm = [&[0_u8; 252][..], &1.0_f32.to_le_bytes()].concat();
    assert_ne!(
        fingerprint(&plain),
        fingerprint(&plain.clone().tensor("output_norm.weight", &[64], F32, norm))
    );
    assert_ne!(fingerprint(&plain), fingerprint(&plain.clone().float("llama.rope.freq_base", 5e5)));
}

#[test]
fn an_output_matrix_of_its_own_is_used() {
    let bytes = tensor(&mut SplitMix::new(9), Q8_0, HIDDEN * VOCAB);
    let weights = read_bytes(&llama(Q4_1).tensor("output.weight", &[HIDDEN, VOCAB], Q8_0, bytes).build());
    assert!(weights.expect("sound").output.is_some());
}

#[test]
fn models_that_cannot_be_computed_are_refused_with_a_reason() {
    let check = |builder: Builder, part: &str| {
        let error = read_bytes(&builder.build()).expect_err(part).to_string();
        assert!(error.contains("tiny-llama.Q4_1.gguf") && error.contains(part), "{part}: {error}");
    };
    let plain = || llama(Q4_1);
    check(plain().text("general.architecture", "qwen2"), "its architecture is qwen2");
    check(plain().without("llama.block_count"), "the number llama.block_count");
    check(plain().number("llama.block_count", 0), "llama.block_count is 0");
    check(plain().number("llama.block_count", 3), "the tensor blk.2.attn_norm.weight");
    check(plain().number("llama.block_count", 1), "a tensor blk.1.");
    check(plain().number("llama.embedding_length", 60), "width 60");
    check(plain().number("llama.feed_forward_length", 128), "shape [64, 128]");
    check(plain().number("llama.attention.head_count_kv", 3), "do not divide");
    check(plain().number("llama.attention.head_count", 1 << 16), "no multiple of 16");
    check(plain().number("llama.attention.value_length", 32), "must be equal");
    check(plain().text("llama.rope.scaling.type", "yarn"), "rotary scaling yarn");
    check(plain().float("llama.rope.freq_base", f32::NAN), "rotary base");
    check(plain().without("tokenizer.ggml.tokens"), "the vocabulary");
    check(plain().texts("tokenizer.ggml.tokens", &["a".into()]), "a vocabulary of 40 tokens (it has 1)");
    check(plain().without("output_norm.weight"), "the tensor output_norm.weight");
    let q6 = tensor(&mut SplitMix::new(2), Q8_0, HIDDEN * 32);
    check(plain().tensor("blk.0.attn_k.weight", &[HIDDEN, 32], Q6_K, q6), "encoding number 14");
    check(plain().tensor("blk.0.attn_q.bias", &[64], F32, vec![0; 256]), "blk.0.attn_q.bias");
    let not_a_number = f32::NAN.to_le_bytes().repeat(64);
    check(plain().tensor("output_norm.weight", &[64], F32, not_a_number), "not a number");
    let bad_scale = [0xff_u8; 20].repeat(128);
    check(plain().tensor("blk.1.attn_q.weight", &[64, 64], Q4_1, bad_scale), "scale that is not a number");
}

#[test]
fn progress_rises_from_nothing_to_all() {
    let bytes = llama(Q8_0).build();
    let mut seen = Vec::new();
    read(&mut Cursor::new(&bytes), bytes.len() as u64, Path::new("x"), &mut |share| seen.push(share))
        .expect("sound");
    assert_eq!((seen[0], seen[seen.len() - 1]), (0.0, 1.0));
    assert!(seen.len() > 10 && seen.is_sorted(), "{seen:?}");
}

#[test]
fn files_that_are_not_there_or_are_no_files_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = folder.path().join("no-such.gguf");
    let error = Weights::load(&missing).expect_err("missing");
    assert!(
        matches!(error, ModelError::Open { .. }) && error.to_string().contains("no-such.gguf"),
        "{error}"
    );
    assert!(Weights::load(folder.path()).is_err());
    let file = folder.path().join("m.gguf");
    std::fs::write(&file, llama(Q4_1).build()).expect("written");
    assert_eq!(Weights::load(&file).expect("sound").config().name, "m");
    assert_eq!(GgufMetadata::read(&file).expect("sound").tokenizer().expect("has one").tokens.len(), 40);
}

#[test]
fn names_lose_their_endings() {
    let check = |path: &str, name: &str| assert_eq!(name_of(Path::new(path)), name);
    check("/x/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct");
    check("llama-3.2-1b.gguf", "llama-3.2-1b");
    check("model.F16.gguf", "model");
    check(".gguf", ".gguf");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_damage_makes_loading_panic(
        changes in prop::collection::vec((0.0_f64..1.0, any::<u8>()), 1..10),
        cut in 0.5_f64..1.2,
    ) {
        let mut file = llama(Q4_1).build();
        // Cubed: most of the damage goes to the front, where there is structure to damage.
        for (at, byte) in changes {
            let at = (at.powi(3) * (file.len() - 1) as f64) as usize;
            file[at] = byte;
        }
        file.truncate((file.len() as f64 * cut) as usize);
        let _ = read_bytes(&file);
    }
}
