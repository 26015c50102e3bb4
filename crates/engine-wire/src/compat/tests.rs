use super::*;

fn layout() -> Layout {
    Layout {
        server: Server::Vllm,
        version: Some("0.32.0".into()),
        root: Some("/models/smol".into()),
        dtype: None,
        cache_dtype: Some("auto".into()),
        block_size_tokens: 32,
        connector: Some("nixl".into()),
    }
}

/// Agents and gateways of different releases compare this number.
#[test]
fn the_number_is_what_it_always_was() {
    assert_eq!(kv_layout(&layout()), 0x682a_2c70_4ebd_b36c);
}

#[test]
fn every_part_counts_and_is_named() {
    let check = |change: fn(&mut Layout), said: &str| {
        let mut other = layout();
        change(&mut other);
        assert_ne!(kv_layout(&layout()), kv_layout(&other), "{said}");
        let sentence = apart(("p0", &layout()), ("d0", &other)).unwrap();
        assert_eq!(sentence, format!("p0 and d0 cannot exchange KV: the {said}"));
    };
    check(|it| it.server = Server::Sglang, "server of p0 is vLLM, of d0 SGLang");
    check(|it| it.version = Some("0.31.0".into()), "version of p0 is 0.32.0, of d0 0.31.0");
    check(|it| it.root = Some("/models/big".into()), "model of p0 is /models/smol, of d0 /models/big");
    check(|it| it.block_size_tokens = 64, "block size of p0 is 32 tokens, of d0 64 tokens");
    check(|it| it.cache_dtype = Some("fp8".into()), "cache dtype of p0 is auto, of d0 fp8");
    check(|it| it.dtype = Some("float32".into()), "dtype of p0 is not told, of d0 float32");
    check(|it| it.connector = None, "KV connector of p0 is nixl, of d0 not told");
}

#[test]
fn equals_may_be_paired() {
    let slash = Layout { root: Some("/models/smol/".into()), ..layout() };
    assert_eq!(kv_layout(&slash), kv_layout(&layout()));
    assert_eq!(apart(("p0", &layout()), ("d0", &slash)), None);
}
