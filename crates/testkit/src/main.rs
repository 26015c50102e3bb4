//! Starts one double and says where it is, or runs the suite against a server.
//!
//! `testkit vllm|sglang|openai [OPTIONS]` takes the options as JSON (all keys optional, as in `VllmOptions` and its
//! kin; times in seconds), prints one line of JSON with the addresses, and runs until SIGINT or SIGTERM.
//! `testkit suite URL [DECODE_URL]` runs the vLLM checks and exits with 1 if one fails; a third word is the API key.
//! `testkit model-dir FOLDER` writes the doubles' tokenizer as a model folder.

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use forebay_testkit::suite::{self, Outcome, Target};
use forebay_testkit::{
    ApiKey, EventEndpoints, OpenAiDouble, OpenAiOptions, Running, SglangDouble, SglangOptions, VllmDouble,
    VllmOptions, tokenizer,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str =
    "usage: testkit vllm|sglang|openai [OPTIONS_JSON] | suite URL [DECODE_URL [API_KEY]] | model-dir FOLDER";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words).await {
        Ok(code) => code,
        Err(error) => {
            let _stderr_may_be_closed = writeln!(io::stderr(), "testkit: {error}");
            ExitCode::from(2)
        }
    }
}

async fn run(words: &[&str]) -> Result<ExitCode, Box<dyn Error>> {
    match words {
        ["vllm", options @ ..] => {
            let double = VllmDouble::try_start(read::<VllmOptions>(options)?).await?;
            serve(&double, json!({"engine_ids": double.engine_ids()})).await
        }
        ["sglang", options @ ..] => {
            let double = SglangDouble::try_start(read::<SglangOptions>(options)?).await?;
            let more = json!({"bootstrap_port": double.bootstrap_port(), "load": double.load_endpoints()});
            serve(&double, more).await
        }
        ["openai", options @ ..] => {
            let double = OpenAiDouble::try_start(read::<OpenAiOptions>(options)?).await?;
            serve(&double, json!({})).await
        }
        ["suite", url, rest @ ..] => check(url, rest).await,
        ["model-dir", folder] => {
            std::fs::create_dir_all(folder)?;
            tokenizer::write_model_dir(Path::new(folder), VllmOptions::default().max_model_len)?;
            Ok(ExitCode::SUCCESS)
        }
        _ => Err(USAGE.into()),
    }
}

fn read<T: DeserializeOwned + Default>(options: &[&str]) -> Result<T, Box<dyn Error>> {
    match options {
        [] => Ok(T::default()),
        [json] => Ok(serde_json::from_str(json)?),
        _ => Err(USAGE.into()),
    }
}

/// Prints the addresses and waits for the end.
async fn serve(double: &Running, more: Value) -> Result<ExitCode, Box<dyn Error>> {
    let endpoint =
        |endpoints: &EventEndpoints| json!({"events": endpoints.events, "replay": endpoints.replay});
    let mut addresses = json!({
        "url": double.url(), "port": double.port(),
        "kv_events": double.event_endpoints().iter().map(endpoint).collect::<Vec<_>>(),
    });
    if let (Value::Object(addresses), Value::Object(more)) = (&mut addresses, more) {
        addresses.extend(more);
    }
    let mut out = io::stdout();
    writeln!(out, "{addresses}")?;
    out.flush()?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs the suite; one line a check.
async fn check(url: &str, rest: &[&str]) -> Result<ExitCode, Box<dyn Error>> {
    let mut target = Target::new(url.trim_end_matches('/'));
    target.decode_url =
        rest.first().map(|url| url.trim_end_matches('/').to_owned()).filter(|url| !url.is_empty());
    target.api_key = rest.get(1).map(|key| ApiKey((*key).to_owned()));
    let target = Arc::new(target);
    let mut failed = 0;
    for check in suite::vllm() {
        let line = match check.run(&target).await {
            Outcome::Passed => format!("pass  {}", check.name),
            Outcome::Skipped(reason) => format!("skip  {}: {reason}", check.name),
            Outcome::Failed(reason) => {
                failed += 1;
                format!("FAIL  {}: {reason}", check.name)
            }
        };
        writeln!(io::stdout(), "{line}")?;
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
