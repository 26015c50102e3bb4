//! Help texts, versions, completions and the exit codes that scripts rely on.

use crate::support::{Server, run};

#[test]
fn the_main_help_is_a_place_to_start() {
    insta::assert_snapshot!(run(&["--help"]).ok().out);
}

#[test]
fn the_short_help_of_serve_shows_the_common_settings() {
    insta::assert_snapshot!(run(&["serve", "-h"]).ok().out);
}

#[test]
fn the_long_help_of_serve_shows_them_all() {
    let help = run(&["serve", "--help"]).ok().out;
    let reference = run(&["config", "reference"]).ok().out;
    let flags: Vec<_> = reference
        .lines()
        .filter_map(|line| line.strip_prefix("| flag | `"))
        .filter_map(|rest| rest.split(['`', ' ']).next())
        .collect();
    assert!(flags.len() > 40, "{flags:?}");
    for flag in flags {
        assert!(help.contains(flag), "{flag}");
    }
    assert!(help.contains("\nAdvanced:\n"), "{help}");
}

#[test]
fn the_help_of_the_clients_is_short() {
    let texts = ["chat", "status", "explain"].map(|command| run(&[command, "-h"]).ok().out);
    insta::assert_snapshot!(texts.join("\n--------\n"));
}

#[test]
fn versions_are_the_same_however_asked_for() {
    let version = run(&["version"]).ok().out;
    assert_eq!(version, format!("forebay {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(run(&["--version"]).ok().out, version);
}

#[test]
fn completions_know_commands_and_settings() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&["completions", shell]).ok().out;
        for word in ["explain", "completions", "admin-listen", "hash-key"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    assert!(run(&["completions", "bash"]).ok().out.contains("round-robin"), "values are completed too");
    assert_eq!(run(&["completions", "cmd"]).code, 2);
}

#[test]
fn exit_codes_tell_what_happened() {
    let server = Server::with_pages(&[]);
    let url = server.url.as_str();
    // A port that nobody listens on: bound and let go. Nothing takes it in the meantime, as it was just handed out.
    let gone =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("an address");
    let gone = format!("http://{gone}");
    let check = |arguments: &[&str], code: i32, part: &str| {
        let ran = run(arguments);
        assert_eq!(ran.code, code, "{arguments:?}: {ran:?}");
        assert!(ran.err.contains(part), "{arguments:?}: {}", ran.err);
        assert!(!ran.err.contains("panicked"), "{arguments:?}: {}", ran.err);
    };
    check(&[], 2, "Usage: forebay");
    check(&["sevre"], 2, "a similar subcommand exists: 'serve'");
    check(&["serve", "--lisen", "x"], 2, "a similar argument exists: '--listen'");
    check(&["serve", "--policy", "rond-robin"], 2, "a similar value exists: 'round-robin'");
    check(&["serve", "--engine", "vlm=http://h:8000"], 2, "did you mean `vllm`?");
    check(&["serve", "--listen", "0.0.0.0:8080"], 2, "there are no keys");
    check(&["config", "check", "/nowhere.toml"], 2, "cannot read the settings file /nowhere.toml");
    check(&["explain"], 2, "required");
    check(&["explain", "an-id", "--last"], 2, "cannot be used with");
    check(&["status", "--interval", "1s"], 2, "--watch");
    check(&["status", "--watch", "--interval", "0"], 2, "expected a duration");
    check(&["keys", "add", "two words"], 2, "must be visible ASCII");
    check(&["status", "--admin-url", "https://h"], 2, "https is not available");
    check(&["status", "--admin-url", &gone], 3, "is `forebay serve` running?");
    check(&["explain", "--last", "--admin-url", &gone], 3, "nothing answers at 127.0.0.1:");
    check(&["chat", "-m", "hi", "--url", &gone], 3, "nothing answers at 127.0.0.1:");
    check(&["explain", "an-id", "--admin-url", url], 4, "knows no request `an-id`");
    check(&["status", "--admin-url", url], 4, "there is nothing here (status 404, code not_found)");
}
