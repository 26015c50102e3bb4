#![allow(warnings, clippy::all, unsafe_code)]
#[path = "../tests/common/mod.rs"]
mod common;
use serde_json::json;
use std::time::Instant;
fn rss() -> String { let s = std::fs::read_to_string("/proc/self/status").unwrap(); s.lines().filter(|l| l.starts_with("VmRSS")||l.starts_with("VmHWM")||l.starts_with("RssAnon")).map(|l| l.split_whitespace().collect::<Vec<_>>()[..2].join("")).collect::<Vec<_>>().join(" ") }
fn main() {
    println!("start {}", rss());
    let t = Instant::now();
    let v = common::read_vocabulary(&common::real_model().unwrap()).unwrap();
    println!("gguf {:?} {}", t.elapsed(), rss());
    println!("pre {:?} add_bos {} bos {:?} eos {:?} types {:?}", v.pre, v.add_bos, v.bos, v.eos, { let mut m = std::collections::BTreeMap::new(); for t in &v.token_types { *m.entry(*t).or_insert(0)+=1; } m });
    println!("{:?}", v.chat_template);
    let mode = std::env::args().nth(1).unwrap();
    let special: Vec<_> = v.token_types.iter().enumerate().filter(|(_, t)| **t == 3).map(|(i, _)| json!({"id": i, "content": v.tokens[i], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})).collect();
    println!("{}", special.iter().map(|s| s["content"].to_string()).collect::<Vec<_>>().join(" "));
    let bl = |r: bool| json!({"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":r});
    let pre = match mode.as_str() {
        "hf" | "general" => json!({"type":"Sequence","pretokenizers":[{"type":"Digits","individual_digits":true}, bl(true)]}),
        "split" => json!({"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"},"behavior":"Isolated","invert":false}, bl(false)]}),
        "gpt2" => bl(true),
        _ => panic!(),
    };
    let t = Instant::now();
    let vocab: serde_json::Map<String, serde_json::Value> = v.tokens.iter().enumerate().map(|(i, t)| (t.clone(), json!(i))).collect();
    let j = json!({"version":"1.0","truncation":null,"padding":null,"added_tokens":special,"normalizer":null,"pre_tokenizer":pre,"post_processor":null,"decoder":bl(true),
      "model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":vocab,"merges":v.merges}});
    println!("json {:?} {}", t.elapsed(), rss());
    drop(v);
    let base = include_str!("../../../Cargo.lock").to_string() + include_str!("../tests/common/mod.rs") + &std::fs::read_to_string("/work/shared/design.md").unwrap();
    let text = base.clone();
    if mode == "hf" {
        let t = Instant::now();
        let tk: tokenizers::Tokenizer = serde_json::from_value(j).unwrap();
        println!("hf load {:?} {}", t.elapsed(), rss()); unsafe { libc::malloc_trim(0); } println!("trimmed {}", rss());
        for n in [500usize, 4000, 40000] {
            let mut k = 0; let t = Instant::now(); let mut bytes=0;
            for c in text.as_bytes().chunks(n).take(60) { let s = String::from_utf8_lossy(c); bytes+=c.len(); k += tk.encode_fast(&*s, false).unwrap().len(); }
            println!("{n}: {k} toks {:.1} MB/s", bytes as f64/t.elapsed().as_secs_f64()/1e6);
        }
        println!("{}", rss());
    } else {
        let t = Instant::now();
        let tk = fastokens::Tokenizer::from_json(j).unwrap();
        println!("fast load {:?} {}", t.elapsed(), rss());
        let t = Instant::now(); tk.encode("hello world").unwrap(); println!("first {:?} {}", t.elapsed(), rss()); unsafe { libc::malloc_trim(0); } println!("trimmed {}", rss());
        for round in 0..2 { for n in [500usize, 4000, 40000] {
            let mut k = 0; let t = Instant::now(); let mut bytes=0;
            for c in text.as_bytes().chunks(n).take(60) { let s = String::from_utf8_lossy(c); bytes+=c.len(); k += tk.encode(&s).unwrap().len(); }
            println!("{n}: {k} toks {:.1} MB/s", bytes as f64/t.elapsed().as_secs_f64()/1e6);
        } }
        println!("{}", rss());
        for k in 0..4 {
            std::thread::scope(|sc| { sc.spawn(|| { let t = Instant::now(); tk.encode("hello world, this is 12 a test").unwrap(); println!("thread first {:?} {}", t.elapsed(), rss());
               let t = Instant::now(); tk.encode(&text[..20000]).unwrap(); println!("20k {:?} {}", t.elapsed(), rss()); }); });
        }
        let bar = std::sync::Barrier::new(4);
        std::thread::scope(|sc| { for k in 0..4 { sc.spawn(|| { tk.encode("hello world, this is 12 a test").unwrap(); bar.wait(); println!("together {}", rss()); bar.wait(); }); }});
        println!("{}", rss());

        let mut seed = 1u64;
        for round in 0..8 {
            let t = Instant::now(); let mut bytes = 0;
            for _ in 0..2000 { let mut s = String::new();
              for _ in 0..250 { seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); let n = (seed>>60) % 8 + 2; let mut x = seed; s.push(' '); for _ in 0..n { x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); s.push((b'a' + ((x>>40)%26) as u8) as char); } }
              bytes += s.len(); tk.encode(&s).unwrap(); }
            println!("garbage {:.1} MB/s {}", bytes as f64/t.elapsed().as_secs_f64()/1e6, rss());
        }
        drop(tk);
        println!("dropped {}", rss());
        println!("trimmed {}", rss());
    }
}
