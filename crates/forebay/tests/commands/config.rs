//! Settings through the binary: flags, environment, file, and keys.

use std::{fs, io::Read as _, process::Stdio};

use crate::support::{Ran, forebay, run};

#[test]
fn show_tells_values_and_where_they_came_from() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("forebay.toml");
    fs::write(&path, "policy = \"least-load\"\nsim_speed = 0.5\nsim_blocks = 9\n").expect("writing a file");
    let path = path.display().to_string();
    let arguments =
        ["config", "show", "--config", &path, "--sim-speed", "2", "--engine", "sim:3", "--engine", "sim"];
    let output = forebay(&arguments).env("FOREBAY_SIM_BLOCKS", "10").output().expect("the binary runs");
    let shown = Ran::from(output).ok().out;
    let check = |name: &str, value: &str, origin: &str| {
        let line = shown.lines().find(|line| line.split_whitespace().next() == Some(name)).expect(name);
        let words: Vec<_> = line.split("  ").map(str::trim).filter(|word| !word.is_empty()).collect();
        assert_eq!(words, [name, value, origin]);
    };
    check("config", &path, "flag --config");
    check("sim_speed", "2", "flag --sim-speed");
    check("sim_blocks", "10", "environment FOREBAY_SIM_BLOCKS");
    check("policy", "least-load", &format!("{path}:1"));
    check("engine", "sim:3 sim:1", "flag --engine");
    check("insecure", "false", "default");
}

#[test]
fn show_prints_json_on_demand_and_never_a_secret() {
    let secret = "00112233445566778899aabbccddeeff";
    let output = forebay(&["config", "show", "--json"])
        .env("FOREBAY_HASH_KEY", secret)
        .output()
        .expect("the binary runs");
    let ran = Ran::from(output).ok();
    assert!(!ran.out.contains(secret));
    let shown: serde_json::Value = serde_json::from_str(&ran.out).expect("JSON");
    let key =
        shown.as_array().expect("a list").iter().find(|line| line["name"] == "hash_key").expect("hash_key");
    assert_eq!(key["value"], "(hidden)");
    assert_eq!(key["origin"], "environment FOREBAY_HASH_KEY");
}

#[test]
fn switches_may_be_said_or_unsaid() {
    let insecure = |flag: &str| {
        let arguments = ["config", "show", flag, "--listen", "0.0.0.0:1"];
        forebay(&arguments).env("FOREBAY_INSECURE", "true").output().expect("the binary runs").status.code()
    };
    assert_eq!(insecure("--insecure"), Some(0));
    assert_eq!(insecure("--insecure=true"), Some(0));
    assert_eq!(insecure("--insecure=false"), Some(2));
}

#[test]
fn check_reads_the_file_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("forebay.toml");
    let check = |text: &str| {
        fs::write(&path, text).expect("writing a file");
        let path = path.display().to_string();
        let output = forebay(&["config", "check", &path])
            .env("FOREBAY_NONSENSE", "1")
            .env("FOREBAY_SIM_SPEED", "broken")
            .output()
            .expect("the binary runs");
        let ran = Ran::from(output);
        (ran.code, (ran.out + &ran.err).replace(&path, "forebay.toml"))
    };
    assert_eq!(
        check("sim_speed = 2\ninsecure = true\n"),
        (0, "forebay.toml: 2 settings, all good\n".to_owned())
    );
    let (code, text) = check("sim_sped = 2\nthreads = 0\n");
    assert_eq!(code, 2);
    insta::assert_snapshot!(text, @r"
    error: 2 settings are wrong
      forebay.toml:1: unknown setting `sim_sped`; did you mean `sim_speed`?
      `threads` is `0` (forebay.toml:2), expected a whole number of at least 1
    ");
}

#[test]
fn a_key_is_shown_once_and_only_its_hash_goes_to_the_file() {
    let first = run(&["keys", "add", "acme"]).ok();
    let second = run(&["keys", "add", "acme"]).ok();
    assert_ne!(first.out, second.out, "keys are random");
    let key = first.err.lines().map(str::trim).find(|line| line.starts_with("fbk-")).expect("the key");
    assert_eq!(key.len(), "fbk-".len() + 48);
    assert!(!first.out.contains(key));
    let words: Vec<_> = first.out.split_whitespace().collect();
    assert_eq!((words.len(), words[0].len(), words[1]), (2, 64, "acme"));
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let mut child =
        forebay(&["config", "reference"]).stdout(Stdio::piped()).spawn().expect("the binary runs");
    // Closed before anything is read, as `head` may do; the page is larger than a pipe only sometimes, so either the
    // write fails or it fits, and neither is an error.
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("text");
    assert_eq!((child.wait().expect("the binary ends").code(), err.as_str()), (Some(0), ""));
}
