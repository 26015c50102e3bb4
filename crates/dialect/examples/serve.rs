//! Serves a simulated engine (or `random-tiny`) until its standard input closes. Prints where, as one line of JSON.
//!
//! `cargo run -p forebay-dialect --example serve -- [sim|random-tiny]`

use std::io::Write as _;

use forebay_dialect::{Addresses, ConnectorOptions, EngineModel, EngineOptions, KvRole, run};
use forebay_engines::simulated::StepCoefficients;
use tokio::{io::AsyncReadExt, net::TcpListener};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = match std::env::args().nth(1).as_deref() {
        Some("random-tiny") => EngineModel::RandomTiny,
        _ => {
            EngineModel::Simulated { speed: 1.0, context_tokens_max: 4096, timing: StepCoefficients::H100_8B }
        }
    };
    let options = EngineOptions {
        connector: Some(ConnectorOptions::loopback(KvRole::Both)),
        ..EngineOptions::new(model)
    };
    let ready = |addresses: &Addresses| {
        let line = serde_json::to_string(addresses).unwrap_or_default();
        let _closed = writeln!(std::io::stdout(), "{line}");
    };
    let closed = async {
        let (mut input, mut bytes) = (tokio::io::stdin(), [0; 64]);
        while matches!(input.read(&mut bytes).await, Ok(1..)) {}
    };
    run(options, TcpListener::bind("127.0.0.1:0").await?, ready, closed).await?;
    Ok(())
}
