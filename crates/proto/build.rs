//! Compiles `proto/forebay/fleet/v1/fleet.proto` and `proto/forebay/index/v1/index.proto` of the repository.

use std::{env, error::Error, ffi::OsString, process::Command};

const PROTOS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../proto");

fn main() -> Result<(), Box<dyn Error>> {
    find_protoc()?;
    // Saying anything of when to run again ends cargo's own watch over the package's files; these lie outside of it.
    println!("cargo:rerun-if-changed={PROTOS}");
    tonic_prost_build::configure()
        .btree_map(".forebay.fleet.v1.Hello.labels")
        .bytes(".forebay.fleet.v1.Tokenizer.data")
        // They hold secrets: `src/secret.rs` has their `Debug`.
        .skip_debug(["forebay.fleet.v1.DataPlane", "forebay.fleet.v1.HashKey"])
        .compile_protos(
            &["fleet", "index"].map(|name| format!("{PROTOS}/forebay/{name}/v1/{name}.proto")),
            &[PROTOS.to_owned()],
        )?;
    Ok(())
}

/// The compiler behind the code generator says nothing of packages when `protoc` is missing.
fn find_protoc() -> Result<(), String> {
    println!("cargo:rerun-if-env-changed=PROTOC");
    #[allow(clippy::disallowed_methods, reason = "a build script's settings are its environment")]
    let protoc = env::var_os("PROTOC").unwrap_or_else(|| OsString::from("protoc"));
    match Command::new(&protoc).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        outcome => Err(format!(
            "cannot run the protocol compiler `{}` ({}). Install it (Debian and Ubuntu: `apt install \
             protobuf-compiler`, macOS: `brew install protobuf`), or set PROTOC to its path; version 3.15 or newer.",
            protoc.to_string_lossy(),
            match outcome {
                Ok(output) => output.status.to_string(),
                Err(error) => error.to_string(),
            }
        )),
    }
}
