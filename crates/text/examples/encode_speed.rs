//! Measures loading and encoding with both back ends on SmolLM2's vocabulary; prints one JSON object a line.
//!
//! `cargo run --release -p forebay-text --example encode_speed`
//!
//! Seconds are CPU seconds of the one thread that encodes, which do not depend on what else the machine does. "fresh"
//! documents share no words that are not English; "repeated" is the same document again.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "its output is what an example is for")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{error::Error, fs, time::Instant};

use forebay_text::{GgufVocabulary, Preference, Source, Tokenizer};
use serde_json::json;

const DOCUMENT_BYTES: [usize; 3] = [500, 4_000, 40_000];

fn main() -> Result<(), Box<dyn Error>> {
    let Some(path) = common::real_model() else { return Ok(()) };
    let vocabulary = common::read_vocabulary(&path)?;
    // Enough of each for the kernel's clock of a thread, which may advance in steps of 4 ms.
    for (preference, total_bytes) in
        [(Preference::FastIfExact, 24_000_000), (Preference::Reference, 1_200_000)]
    {
        measure(vocabulary.clone(), preference, total_bytes)?;
    }
    Ok(())
}

fn measure(
    vocabulary: GgufVocabulary,
    preference: Preference,
    total_bytes: usize,
) -> Result<(), Box<dyn Error>> {
    let resident_before = resident_kib()?;
    let (started, cpu_started) = (Instant::now(), process_cpu_seconds()?);
    let tokenizer = Tokenizer::load(Source::Gguf(vocabulary), preference)?;
    let backend = format!("{:?}", tokenizer.backend());
    println!(
        "{}",
        json!({"backend": backend, "load_seconds": started.elapsed().as_secs_f64(),
               "load_cpu_seconds": process_cpu_seconds()? - cpu_started,
               "resident_mib": (resident_kib()? - resident_before) / 1024.0})
    );
    for bytes in DOCUMENT_BYTES {
        let documents = documents(bytes, total_bytes / bytes);
        for text in ["fresh", "repeated"] {
            let mut tokens = Vec::new();
            let started = cpu_seconds()?;
            for index in 0..documents.len() {
                tokens.clear();
                let index = if text == "fresh" { index } else { 0 };
                tokenizer.encode(&documents[index], &mut tokens)?;
            }
            let megabytes = (documents.len() * bytes) as f64 / 1e6;
            let rate = megabytes / (cpu_seconds()? - started);
            println!(
                "{}",
                json!({"backend": backend, "document_bytes": bytes, "text": text, "mb_per_cpu_second": rate.round()})
            );
        }
    }
    println!(
        "{}",
        json!({"backend": backend, "resident_mib_after": (resident_kib()? - resident_before) / 1024.0})
    );
    Ok(())
}

/// English-like text: common words, rare made-up ones, numbers and punctuation, from a fixed seed.
fn documents(bytes: usize, count: usize) -> Vec<String> {
    const COMMON: &str = "the of and to in a is that for it was on are as with his they at be this have from or had by \
        word but what some we can out other were all there when up use your how said an each she which do their time \
        if will way about many then them would write like so these her long make thing see him two has look more day";
    let common: Vec<&str> = COMMON.split_whitespace().collect();
    let mut state = bytes as u64;
    let mut draw = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % below) as usize
    };
    let document = |draw: &mut dyn FnMut(u64) -> usize| {
        let mut text = String::with_capacity(bytes + 16);
        while text.len() < bytes {
            match draw(20) {
                0 => text.push_str(&draw(3000).to_string()),
                1 => text.extend(
                    (0..4 + draw(5)).map(|i| ["aeiou", "bcdfglmnprst"][i % 2].as_bytes()[draw(5)] as char),
                ),
                2 => text.push_str([",", ".", ".\n", "?", " -"][draw(5)]),
                _ => text.push_str(common[draw(common.len() as u64)]),
            }
            text.push(' ');
        }
        text.truncate(bytes);
        text
    };
    (0..count).map(|_| document(&mut draw)).collect()
}

fn cpu_seconds() -> Result<f64, Box<dyn Error>> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanoseconds: f64 = text.split_whitespace().next().ok_or("an empty schedstat")?.parse()?;
    Ok(nanoseconds / 1e9)
}

/// Of all threads, in steps of 10 ms.
fn process_cpu_seconds() -> Result<f64, Box<dyn Error>> {
    let text = fs::read_to_string("/proc/self/stat")?;
    let fields = text.rsplit(')').next().ok_or("an empty stat")?.split_whitespace();
    let ticks: Result<Vec<f64>, _> = fields.skip(11).take(2).map(str::parse).collect();
    Ok(ticks?.iter().sum::<f64>() / 100.0)
}

fn resident_kib() -> Result<f64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
