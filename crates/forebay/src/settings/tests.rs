use std::{collections::BTreeMap, io::Write as _, time::Duration};

use super::*;

fn environment(variables: &[(&str, &str)]) -> BTreeMap<String, String> {
    variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().expect("a temporary file");
    file.write_all(text.as_bytes()).expect("writing it");
    file
}

fn path_of(file: &tempfile::NamedTempFile) -> String {
    file.path().display().to_string()
}

fn shown(settings: &Settings, name: &str) -> (String, String) {
    let line = settings.shown().into_iter().find(|line| line.name == name).expect(name);
    (line.value, line.origin)
}

#[test]
fn each_layer_overrides_the_one_below_and_is_remembered() {
    let file =
        file("sim_speed = 3\n\nsequences_max = 8\nlisten = \"127.0.0.1:3000\"\nlog_format = \"json\"\n");
    let path = path_of(&file);
    let flags = SettingFlags::of(&[("listen", "127.0.0.1:1000")]);
    let variables = environment(&[
        ("FOREBAY_CONFIG", &path),
        ("FOREBAY_LISTEN", "127.0.0.1:2000"),
        ("FOREBAY_SEQUENCES_MAX", "16"),
        ("PATH", "/bin"),
    ]);
    let settings = Settings::load(&flags, &variables).expect("good settings");
    //    setting            value               from
    let rows = [
        ("config", path.clone(), "environment FOREBAY_CONFIG".to_owned()),
        ("listen", "127.0.0.1:1000".to_owned(), "flag --listen".to_owned()),
        ("sequences_max", "16".to_owned(), "environment FOREBAY_SEQUENCES_MAX".to_owned()),
        ("sim_speed", "3".to_owned(), format!("{path}:1")),
        ("log_format", "json".to_owned(), format!("{path}:5")),
        ("policy", "cost".to_owned(), "default".to_owned()),
    ];
    for (name, value, origin) in rows {
        assert_eq!(shown(&settings, name), (value, origin), "{name}");
    }
    assert_eq!(settings.doors.listen.port(), 1_000);
    assert_eq!(settings.engines.sequences_max.get(), 16);
}

#[test]
fn the_flag_for_the_file_overrides_the_variable() {
    let by_flag = file("sim_speed = 5");
    let flags = SettingFlags::of(&[("config", &path_of(&by_flag))]);
    let variables = environment(&[("FOREBAY_CONFIG", "/nowhere/at/all.toml")]);
    let settings =
        Settings::load(&flags, &variables).expect("the file of the flag is read, the other is not");
    assert_eq!(settings.engines.sim_speed, 5.0);
}

#[test]
fn a_file_takes_the_types_that_toml_has() {
    let file = file(
        "engine = [\"embedded:2,role=prefill\", \"sim\"]\ninsecure = true\nbody_bytes_max = 1_000\n\
         request_seconds_max = 1.5\nshutdown_seconds_max = \"2m\"\nhash_key = \"000102030405060708090a0b0c0d0e0f\"\n",
    );
    let settings = Settings::load_file(&path_of(&file)).expect("good settings");
    assert_eq!(shown(&settings, "engine").0, "embedded:2,role=prefill sim:1");
    assert!(settings.doors.insecure);
    assert_eq!(settings.http.http_limits().body_bytes_max, 1_000);
    assert_eq!(settings.limits.request_seconds_max, Duration::from_millis(1_500));
    assert_eq!(settings.http.shutdown_seconds_max, Duration::from_secs(120));
    assert_eq!(settings.kv.hash_key, Some(forebay_kv_hash::HashKey::GOLDEN));
    assert_eq!(shown(&settings, "hash_key").0, "(hidden)");
}

#[test]
fn engines_of_a_file_may_be_tables() {
    let text = "[[engine]]\nurl = \"http://h:8000\"\nkind = \"vllm\"\nrole = \"decode\"\nkey_file = \"/k\"\n\
                weight = 2\nlabels = { zone = \"a\" }\n[[engine]]\nurl = \"http://i:8000\"\n";
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), text).expect("it is ours");
    let settings = Settings::load_file(&file.path().display().to_string()).expect("good settings");
    let engine = settings.shown().into_iter().find(|shown| shown.name == "engine").expect("it is a setting");
    assert_eq!(
        engine.value,
        "vllm=http://h:8000,role=decode,key-file=/k,weight=2,label=zone:a http://i:8000"
    );
}

#[test]
fn mistakes_in_a_file_are_named_with_their_line() {
    let check = |text: &str, expected: &str| {
        let file = file(text);
        let error = Settings::load_file(&path_of(&file)).expect_err(text).to_string();
        let error = error.replace(&path_of(&file), "f.toml");
        assert_eq!(error, expected, "{text}");
    };
    check("\nlisen = \"x\"", "f.toml:2: unknown setting `lisen`; did you mean `listen`?");
    check(
        "temperature = 1",
        "f.toml:1: unknown setting `temperature`; `forebay config reference` lists them all",
    );
    check(
        "[limits]\ndecisions_max = 1",
        "f.toml:1: `[limits]` begins a section, and settings have none; write them without it",
    );
    check(
        "config = \"other.toml\"",
        "f.toml:1: `config` cannot be set in a file; use its flag or environment variable",
    );
    check("a = 1\nb = = 2", "f.toml:2: not valid TOML: extra `=`, expected nothing");
    check(
        "sequences_max = \"8\"",
        "`sequences_max` is `\"8\"` (f.toml:1), expected a whole number of at least 1: in a file that is a number \
         without quotes",
    );
    check("sequences_max = 0", "`sequences_max` is `0` (f.toml:1), expected a whole number of at least 1");
    check(
        "insecure = \"yes\"",
        "`insecure` is `\"yes\"` (f.toml:1), expected true or false: in a file that is true or false without quotes",
    );
    check(
        "request_seconds_max = \"soon\"",
        "`request_seconds_max` is `soon` (f.toml:1), expected a duration such as 10s, 500ms, 2m or 1h (a bare number \
         is seconds)",
    );
    check("hash_key = \"secret!\"", "`hash_key` is `(hidden)` (f.toml:1), expected 32 hexadecimal digits");
    check(
        "hash_key = 7",
        "`hash_key` is `(hidden)` (f.toml:1), expected 32 hexadecimal digits: in a file that is a string in quotes",
    );
    check(
        "engine = [\"embedded:0\"]",
        "`engine` is `embedded:0` (f.toml:1), expected KIND[:N][,role=prefill|decode|both] such as embedded:4, or \
         [KIND=]URL[,OPTION=VALUE...] such as vllm=http://host:8000,role=decode: `0` is no number of engines; it must \
         be 1 to 4096",
    );
}

#[test]
fn every_mistake_is_reported_at_once() {
    let flags = SettingFlags::of(&[("sim_speed", "-1"), ("listen", "here")]);
    let variables = environment(&[("FOREBAY_THREAD", "2")]);
    let error = Settings::load(&flags, &variables).expect_err("three mistakes").to_string();
    insta::assert_snapshot!(error, @r"
    3 settings are wrong
      environment variable FOREBAY_THREAD names no setting; did you mean `FOREBAY_THREADS`?
      `listen` is `here` (flag --listen), expected an IP address and a port such as 127.0.0.1:8080
      `sim_speed` is `-1` (flag --sim-speed), expected a number of at least 0
    ");
}

#[test]
fn the_environment_is_checked_but_not_for_what_is_not_ours() {
    let check = |name: &str, expected: Option<&str>| {
        let result = Settings::load(&SettingFlags::default(), &environment(&[(name, "1")]));
        match expected {
            None => assert!(result.is_ok(), "{name}: {result:?}"),
            Some(part) => {
                let error = result.expect_err(name).to_string();
                assert!(error.contains(part), "{name}: {error}");
            }
        }
    };
    check("FOREBAY_API_KEY", None);
    check("FOREBAY_URL", None);
    check("FOREBAY_PORT_8080_TCP", None);
    check("FOREBAY_SERVICE_HOST", None);
    check("FOREBAYS", None);
    check("FOREBAY_SEQUENCE_MAX", Some("did you mean `FOREBAY_SEQUENCES_MAX`?"));
    check("FOREBAY_sequences_max", Some("names no setting"));
    check("FOREBAY_", Some("names no setting"));
}

#[test]
fn an_exposed_address_needs_keys_or_the_word() {
    let check = |flags: &[(&'static str, &str)], expected: Result<(), &str>| {
        let result = Settings::load(&SettingFlags::of(flags), &BTreeMap::new());
        match expected {
            Ok(()) => assert!(result.is_ok(), "{flags:?}: {result:?}"),
            Err(part) => {
                let error = result.expect_err(part).to_string();
                assert!(error.contains(part), "{flags:?}: {error}");
            }
        }
    };
    let key_advice = Err("give `api_keys` a file");
    check(&[("listen", "0.0.0.0:8080")], key_advice);
    check(&[("listen", "[::]:8080")], key_advice);
    check(&[("listen", "10.0.0.7:8080")], key_advice);
    check(&[("listen", "0.0.0.0:8080"), ("api_keys", "keys")], Ok(()));
    check(&[("listen", "0.0.0.0:8080"), ("insecure", "true")], Ok(()));
    check(&[("listen", "127.9.9.9:8080")], Ok(()));
    check(&[("listen", "[::1]:8080")], Ok(()));
    check(&[("listen", "[::ffff:127.0.0.1]:8080")], Ok(()));
    check(&[("admin_listen", "0.0.0.0:8081"), ("api_keys", "keys")], Err("asks for no key"));
    check(&[("admin_listen", "0.0.0.0:8081"), ("insecure", "true")], Ok(()));
    check(&[("admin_listen", "127.0.0.1:8080")], Err("an address each"));
    check(&[("listen", "127.0.0.1:0"), ("admin_listen", "127.0.0.1:0")], Ok(()));
}

#[test]
fn a_step_must_have_room_for_every_running_sequence() {
    let flags = SettingFlags::of(&[("step_tokens_max", "8"), ("sequences_max", "9")]);
    let error = Settings::load(&flags, &BTreeMap::new()).expect_err("8 tokens for 9 sequences").to_string();
    assert!(error.contains("`step_tokens_max` is 8, less than `sequences_max`, 9"), "{error}");
}

#[test]
fn an_index_too_small_for_one_rank_is_refused() {
    let load = |bytes| Settings::load(&SettingFlags::of(&[("index_bytes_max", bytes)]), &BTreeMap::new());
    let error = load("1000KiB").expect_err("less than a table's page and some blocks").to_string();
    assert!(error.contains("`index_bytes_max` is 1000KiB, too little"), "{error}");
    assert!(load("1MiB").is_ok());
}

#[test]
fn named_models_lie_in_the_users_cache_folder_unless_told() {
    let folder = |flags: &[(&'static str, &str)], variables: &[(&str, &str)]| {
        let settings = Settings::load(&SettingFlags::of(flags), &BTreeMap::new()).expect("good settings");
        settings.model_folder(&environment(variables)).map(|path| path.display().to_string())
    };
    let home = ("HOME", "/home/ada");
    assert_eq!(folder(&[], &[]), None);
    assert_eq!(folder(&[], &[home]).as_deref(), Some("/home/ada/.cache/forebay/models"));
    assert_eq!(folder(&[], &[home, ("XDG_CACHE_HOME", "/var/c")]).as_deref(), Some("/var/c/forebay/models"));
    assert_eq!(folder(&[("model_folder", "/m")], &[home]).as_deref(), Some("/m"));
}

#[test]
fn every_default_reads_back_as_itself_in_its_own_text_form() {
    for setting in known_settings().filter(|setting| setting.name != "config") {
        let default = (setting.default)();
        if default == value::UNSET {
            continue;
        }
        let variables = environment(&[(&setting.environment_name(), &default)]);
        let settings = Settings::load(&SettingFlags::default(), &variables)
            .unwrap_or_else(|error| panic!("{}: {error}", setting.name));
        assert_eq!(shown(&settings, setting.name).0, default, "{}", setting.name);
    }
}

#[test]
fn every_setting_is_documented_and_named_once() {
    let mut names: Vec<_> = known_settings().map(|setting| setting.name).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count, "two settings share a name");
    for setting in known_settings() {
        assert!(setting.paragraph().ends_with('.'), "{} needs a doc comment in sentences", setting.name);
    }
}
