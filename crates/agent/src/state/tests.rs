use super::*;
use crate::command::Purpose;

fn state(engine: &str) -> State {
    State {
        format: STATE_FORMAT,
        agent_version: "0.1.0".to_owned(),
        engine: engine.into(),
        incarnation: Incarnation(7),
        last_ports: Ports::new(),
        life: Some(LifeState {
            process: Some(Identity { pid: 12, start_ticks: 34, boot_id: "b".to_owned() }),
            started_as: Incarnation(6),
            command: vec!["vllm".to_owned(), "serve".to_owned(), "m".to_owned()],
            program: Program::Vllm,
            local_url: "http://127.0.0.1:20000".to_owned(),
            advertised_url: "http://host-a:20000".to_owned(),
            key: Some(Secret::new("geheim")),
            key_fences: true,
            ports: Ports::from([(Purpose::Http, 20_000), (Purpose::Events, 20_001)]),
            model: Some("m".to_owned()),
            started_unix_ms: 1,
            server_began_ms: Some(2),
            draining: None,
            notes: Vec::new(),
        }),
    }
}

#[test]
fn a_state_comes_back_and_only_its_user_can_read_it() {
    let root = tempfile::tempdir().expect("a folder");
    let engine: EngineName = "vllm-0".into();
    let folder = EngineFolder::lock(root.path(), &engine).expect("free");
    assert_eq!(folder.read().expect("readable"), Found::Nothing);
    folder.write(&state("vllm-0")).expect("written");
    assert_eq!(folder.read().expect("readable"), Found::State(Box::new(state("vllm-0"))));
    let mode = |path: PathBuf| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!(
        (mode(root.path().join("vllm-0")), mode(root.path().join("vllm-0/state.json"))),
        (0o700, 0o600)
    );
    folder.write_secret(&Secret::new("api-key: x\n")).expect("written");
    assert_eq!(mode(folder.secret_file()), 0o600);
    assert!(!format!("{:?}", state("x")).contains("geheim"));
    assert_eq!(ports_of_others(root.path(), &"other".into()), [20_000, 20_001]);
    assert!(ports_of_others(root.path(), &engine).is_empty());
}

#[test]
fn one_agent_has_an_engine() {
    let root = tempfile::tempdir().expect("a folder");
    let engine: EngineName = "e".into();
    assert_eq!(EngineFolder::holder(root.path(), &engine).expect("readable"), None);
    let folder = EngineFolder::lock(root.path(), &engine).expect("free");
    let own = std::process::id() as i32;
    assert_eq!(EngineFolder::holder(root.path(), &engine).expect("readable"), Some(own));
    let error = EngineFolder::lock(root.path(), &engine).expect_err("held").to_string();
    assert_eq!(
        error,
        format!(
            "another agent (process {own}) has engine e: end that one first, or give this one another name"
        )
    );
    assert!(EngineFolder::lock(root.path(), &"f".into()).is_ok(), "another engine is free");
    drop(folder);
    assert!(EngineFolder::lock(root.path(), &engine).is_ok(), "the lock goes with its agent");
}

#[test]
fn what_is_no_state_of_this_engine_is_put_aside_with_a_sentence() {
    let newer = serde_json::json!({ "format": STATE_FORMAT + 1, "agent_version": "9.0" }).to_string();
    let foreign = serde_json::to_string(&state("other")).expect("plain data");
    let cut = &foreign[..foreign.len() / 2];
    //    the file                              what is said
    let rows = [
        ("", "it is not what an agent writes: EOF while parsing a value at line 1 column 0"),
        ("\0\0\0\0", "it is not what an agent writes: expected value at line 1 column 1"),
        ("[]", "it is not what an agent writes"),
        ("{\"format\":1}", "it is not what an agent writes: missing field `agent_version`"),
        (cut, "it is not what an agent writes: EOF"),
        (foreign.as_str(), "it is of engine other"),
    ];
    for (text, said) in rows {
        let root = tempfile::tempdir().expect("a folder");
        let folder = EngineFolder::lock(root.path(), &"e".into()).expect("free");
        fs::write(folder.state_file(), text).expect("written");
        let Found::PutAside(sentence) = folder.read().expect("readable") else {
            panic!("{text} was taken for a state");
        };
        assert!(sentence.contains(said) && sentence.contains("end it by hand"), "{sentence}");
        assert_eq!(fs::read_to_string(root.path().join("e/state.json.unusable")).expect("kept"), text);
        assert_eq!(folder.read().expect("readable"), Found::Nothing);
    }
    let root = tempfile::tempdir().expect("a folder");
    let folder = EngineFolder::lock(root.path(), &"e".into()).expect("free");
    fs::write(folder.state_file(), newer).expect("written");
    let error = folder.read().expect_err("a newer agent's").to_string();
    assert!(error.contains("was written by a newer agent (9.0), whose engine may be running"), "{error}");
    assert!(folder.state_file().exists(), "it stays for the newer agent");
}

#[test]
fn any_name_becomes_one_folder_below_the_root() {
    //    name            folder
    let rows = [
        ("vllm-0", "vllm-0"),
        ("10.0.0.1:8000", "10.0.0.1%3a8000"),
        ("../up", "%2e.%2fup"),
        (".hidden", "%2ehidden"),
        ("ä b", "%c3%a4%20b"),
        ("%2e", "%252e"),
    ];
    for (name, folder) in rows {
        let path = EngineFolder::path_of(Path::new("/r"), &name.into()).expect(name);
        assert_eq!(path, Path::new("/r").join(folder));
    }
    for name in ["", &"x".repeat(300)] {
        let error = EngineFolder::path_of(Path::new("/r"), &name.into()).expect_err("refused").to_string();
        assert!(error.starts_with("an engine's name has 1 to 200 bytes"), "{error}");
    }
}
