//! `forebay simulate` as people and scripts meet it.

use std::{fmt::Write as _, path::PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Ran, run};

fn simulate(arguments: &[&str]) -> Ran {
    run(&[&["simulate"], arguments].concat())
}

/// Three conversations' worth of a trace, in Mooncake's form, a second from row to row.
fn trace() -> String {
    let mut text = String::new();
    for row in 0..40 {
        let (conversation, turn) = (row % 3, row / 3);
        let ids: Vec<u64> = (0..=turn).map(|block| conversation * 1000 + block).collect();
        let (at, tokens) = (row * 1000, 512 * (turn + 1) - 100);
        let row = format!(
            r#"{{"timestamp": {at}, "input_length": {tokens}, "output_length": 50, "hash_ids": {ids:?}}}"#
        );
        writeln!(text, "{row}").expect("a string takes it");
    }
    text
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder of its own"))
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("a folder of its own");
        path.display().to_string()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

#[test]
fn the_help_of_simulate_has_examples() {
    insta::assert_snapshot!(run(&["simulate", "-h"]).ok().out);
}

#[test]
fn policies_stand_beside_each_other_in_the_order_asked_for() {
    let folder = Folder::new();
    let trace = folder.write("trace.jsonl", &trace());
    let ran =
        simulate(&["--trace", &trace, "--engines", "2", "--policy", "sticky,cost", "--policy", "random"])
            .ok();
    let rows: Vec<&str> = ran.out.lines().collect();
    assert_eq!(rows[0], "trace.jsonl on 2 x h100-llama8b");
    let names: Vec<&str> = rows[2..].iter().filter_map(|row| row.split_whitespace().next()).collect();
    assert_eq!(names, ["sticky", "cost", "random"], "{}", ran.out);
    assert!(rows[2..].iter().all(|row| row.split_whitespace().nth(1) == Some("40")), "{}", ran.out);
    assert!(ran.err.contains("120 requests simulated"), "{}", ran.err);
}

#[test]
fn one_seed_gives_one_result_to_the_byte() {
    let folder = Folder::new();
    let trace = folder.write("trace.jsonl", &trace());
    let mut texts = Vec::new();
    for jobs in ["1", "3"] {
        let page = folder.path(&format!("{jobs}.html")).display().to_string();
        let out = simulate(&[
            "--trace",
            &trace,
            "--speed",
            "x4",
            "--policy",
            "cost,random,least-load",
            "--jobs",
            jobs,
            "--json",
            "-",
            "--report",
            &page,
        ])
        .ok()
        .out;
        texts.push((out, std::fs::read_to_string(page).unwrap()));
    }
    assert!(texts[0] == texts[1]);
    let document: Value = serde_json::from_str(&texts[0].0).unwrap();
    let summary = &document["runs"][0]["summary"];
    assert_eq!((summary["requests"].as_u64(), summary["unfinished"].as_u64()), (Some(40), Some(0)));
    assert!(summary["cached_share"].as_f64().is_some_and(|share| share > 0.5), "{summary}");
    assert!(document["seconds"].as_f64().is_some_and(|seconds| (9.7..9.8).contains(&seconds)), "{document}");
}

#[test]
fn the_page_holds_what_was_seen() {
    let folder = Folder::new();
    let trace = folder.write("<b>trace.jsonl", &trace());
    let page = folder.path("page.html").display().to_string();
    simulate(&["--trace", &trace, "--engines", "3", "--policy", "cost,round-robin", "--report", &page]).ok();
    let text = std::fs::read_to_string(page).unwrap();
    let (_, rest) = text.split_once("const DATA = ").unwrap();
    let mut documents = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
    let document = documents.next().unwrap().unwrap();
    assert_eq!(document["facts"][0][1], "<b>trace.jsonl");
    let run = &document["runs"][1];
    assert_eq!(run["policy"], "round-robin");
    assert_eq!(run["engines"].as_array().map(Vec::len), Some(3));
    assert_eq!(run["distributions"]["ttft_ms"].as_array().map(Vec::len), Some(201));
    assert!(run["engines"][0]["samples"].as_array().is_some_and(|samples| samples.len() > 200));
    assert!(run["steps"].as_array().is_some_and(|steps| steps.len() > 100));
    assert!(run["cached"].as_array().is_some_and(|points| !points.is_empty()));
}

#[test]
fn fleets_have_kinds_and_roles() {
    let folder = Folder::new();
    let fleet = "[[engine]]\nrole = \"prefill\"\n\n[[engine]]\ncount = 2\nrole = \"decode\"\nblocks = 9000\n\
                 [gateway]\ncount = 2\nsight = \"sampled\"\nfirst_token = \"decode\"\n";
    let fleet = folder.write("fleet.toml", fleet);
    let ran = simulate(&[
        "--workload",
        "fresh",
        "--rate",
        "3",
        "--seconds",
        "20",
        "--fleet",
        &fleet,
        "--json",
        "-",
    ])
    .ok();
    let document: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(document["runs"][0]["summary"]["split_share"].as_f64(), Some(1.0));
    assert_eq!(document["fleet"], "1 x h100-llama8b, 2 x h100-llama8b");
}

#[test]
fn every_generator_and_policy_runs() {
    for workload in ["five-turn", "fresh", "stand-in", "agent", "document", "bursts"] {
        let arguments =
            ["--workload", workload, "--seconds", "5", "--warm-up", "1", "--rate", "3", "--policy", "all"];
        let ran = simulate(&arguments).ok();
        assert_eq!(ran.out.lines().count(), 11, "{workload}: {}", ran.out);
    }
}

#[test]
fn what_is_wrong_is_said_with_where() {
    let folder = Folder::new();
    let check = |arguments: &[&str], code: i32, part: &str| {
        let ran = simulate(arguments);
        assert_eq!(ran.code, code, "{arguments:?}: {ran:?}");
        assert!(ran.err.contains(part), "{arguments:?}: {}", ran.err);
    };
    let broken = folder.write("broken.jsonl", &format!("{}nonsense\n", trace()));
    check(&["--trace", &broken], 1, "line 41, column 2: expected");
    let skipped = simulate(&["--trace", &broken, "--skip-bad"]).ok();
    assert!(skipped.err.contains("1 lines were left out"), "{}", skipped.err);
    let unknown = folder.write("unknown.txt", "hello\n");
    check(&["--trace", &unknown], 1, "name it with --form");
    let full = folder.write("full.toml", "[[engine]]\nweights_gib = 79\n");
    check(&["--workload", "fresh", "--fleet", &full], 1, "leave nothing for KV");
    let wrong = folder.write("wrong.toml", "[[engine]]\nweigths = 1\n");
    check(&["--workload", "fresh", "--fleet", &wrong], 1, "unknown field `weigths`");
    check(&["--workload", "fresh", "--policy", "costs"], 2, "did you mean `cost`");
    check(&["--workload", "fresh", "--policy", "static-1p1d"], 2, "set `role` in the fleet file");
    check(&["--workload", "fresh", "--slo", "e2e=2s"], 2, "there are ttft, itl and prefills");
    check(&["--workload", "fresh", "--engines", "0"], 1, "there is no engine");
    check(&[], 2, "--trace");
    let nowhere = folder.path("no/folder/page.html").display().to_string();
    check(
        &["--workload", "fresh", "--seconds", "1", "--warm-up", "0", "--report", &nowhere],
        1,
        "cannot write",
    );
}

#[test]
fn the_help_of_size_has_examples() {
    insta::assert_snapshot!(run(&["size", "-h"]).ok().out);
}

fn size(arguments: &[&str]) -> Ran {
    let load = ["size", "--workload", "fresh", "--rate", "8", "--seconds", "15", "--warm-up", "5"];
    run(&[&load, arguments].concat())
}

#[test]
fn the_smallest_fleet_of_each_shape_is_found() {
    let texts: Vec<String> = ["1", "4"]
        .map(|jobs| {
            size(&["--gpus", "8", "--slo", "ttft=500ms,itl=25ms", "--jobs", jobs, "--json", "-"]).ok().out
        })
        .into();
    assert!(texts[0] == texts[1], "one seed, one result");
    let document: Value = serde_json::from_str(&texts[0]).unwrap();
    let shapes = document["shapes"].as_array().unwrap();
    assert_eq!(shapes.len(), 7);
    let gpus: Vec<u64> = shapes.iter().filter_map(|shape| shape["smallest"]["gpus"].as_u64()).collect();
    assert!(gpus.is_sorted() && (1..=4).contains(&gpus[0]), "{gpus:?}");
    for shape in shapes {
        let kept = |trial: &Value| trial["binds"].is_null();
        let least = shape["trials"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|trial| kept(trial))
            .map(|trial| &trial["engines"]);
        assert_eq!(
            least.map(|it| it.as_u64().unwrap()).min(),
            shape["smallest"]["engines"].as_u64(),
            "{shape}"
        );
    }
    let folder = Folder::new();
    let report = folder.path("size.html").display().to_string();
    let table = size(&["--gpus", "8", "--slo", "ttft=500ms,itl=25ms", "--report", &report]).ok().out;
    assert!(table.starts_with("fresh at 8/s, P90 within ttft=500ms,itl=25ms\n"), "{table}");
    assert!(table.contains("goodput by GPUs") && table.contains(" kept\n"), "{table}");

    let frontier = document["frontier"].as_array().unwrap();
    let gpus: Vec<u64> = frontier.iter().map(|trial| trial["gpus"].as_u64().unwrap()).collect();
    assert!(gpus.is_sorted() && gpus.windows(2).all(|pair| pair[0] < pair[1]), "{gpus:?}");
    assert_eq!(gpus[0], 1, "it begins with the smallest fleet");
    let [total, enough] =
        ["blocks_total", "blocks_enough"].map(|name| document["kv"][name].as_u64().unwrap());
    assert!((1..=total).contains(&enough), "{enough} of {total}");
    assert!(table.contains(&format!("KV: {enough} of the {total} blocks of an engine")), "{table}");
    let page = std::fs::read_to_string(&report).unwrap();
    let points: usize = shapes.iter().map(|shape| shape["trials"].as_array().unwrap().len()).sum();
    assert!(page.matches("<title>").count() > points, "a point for every fleet tried");
    assert!(page.contains(&format!("KV: {enough} of the {total} blocks")) && page.ends_with("</html>\n"));
}

#[test]
fn a_promise_that_no_fleet_keeps_is_said_with_the_nearest() {
    let ran = size(&["--gpus", "2", "--slo", "ttft=20ms,itl=25ms"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.err.contains("no fleet of up to 2 GPUs keeps ttft=20ms,itl=25ms; nearest are"),
        "{}",
        ran.err
    );
    assert!(ran.out.contains("as many break it: time to the first token"), "{}", ran.out);
    let folder = Folder::new();
    let large = folder.write("large.toml", "[[engine]]\ngpus = 8\n");
    let ran = size(&["--gpus", "4", "--fleet", &large]);
    assert!(ran.code == 1 && ran.err.contains("one engine takes 8 GPUs"), "{ran:?}");
    assert_eq!(size(&["--percentile", "p30"]).code, 2);
}

/// What a command says that exits with `code`.
fn refused(code: i32, arguments: &[&str]) -> String {
    let ran = run(arguments);
    assert_eq!(ran.code, code, "{ran:?}");
    ran.err
}

#[test]
fn faults_of_the_fleet_file_happen() {
    let folder = Folder::new();
    let trace = folder.write("trace.jsonl", &trace());
    let calm = "[[engine]]\ncount = 2\n";
    let crash = "[[fault]]\nkind = \"crash\"\nat = 5.02\nseconds = 3\nengine = 0\n";
    let run = |fleet: &str| {
        let fleet = folder.write("fleet.toml", fleet);
        let out = simulate(&["--trace", &trace, "--fleet", &fleet, "--policy", "round-robin", "--json", "-"])
            .ok()
            .out;
        let document: Value = serde_json::from_str(&out).expect("it is JSON");
        let summary = &document["runs"][0]["summary"];
        let moved = ["retries", "migrations"].map(|name| summary[name].as_u64().expect("a count"));
        (summary["unfinished"].as_u64(), moved.iter().sum::<u64>())
    };
    assert_eq!(run(calm), (Some(0), 0));
    let (unfinished, moved) =
        run(&format!("{calm}{crash}{}", crash.replace("engine = 0", "engine = 1").replace("5.02", "9.02")));
    assert_eq!(unfinished, Some(0));
    assert!(moved > 0);

    let fleet = folder.write("fleet.toml", &format!("{calm}{}", crash.replace("engine = 0", "engine = 7")));
    let error = refused(1, &["simulate", "--trace", &trace, "--fleet", &fleet]);
    assert!(error.contains("fault 1: `engine` is 7, and the engines are 0 to 1"), "{error}");
    let error = refused(1, &["size", "--trace", &trace, "--fleet", &fleet]);
    assert!(error.contains("has no faults"), "{error}");
}

#[test]
fn chaos_says_that_all_held_and_logs_a_seed() {
    let ran = simulate(&["--chaos", "--seed", "5", "--seeds", "20"]).ok();
    assert!(ran.out.starts_with("20 seeds from 5 on: all that must hold did. "), "{}", ran.out);
    let log = simulate(&["--chaos", "--seed", "5", "--log"]).ok().out;
    assert!(log.lines().count() > 100 && log.contains("request 0 arrives at gateway"), "{log}");
    assert_eq!(log, simulate(&["--chaos", "--seed", "5", "--log"]).ok().out);
    refused(2, &["simulate", "--seeds", "5"]);
    refused(2, &["simulate", "--chaos", "--workload", "fresh"]);
    let nothing = refused(2, &["simulate"]);
    assert!(nothing.contains("give --trace FILE, --workload NAME, --against FILE or --chaos"), "{nothing}");
}

/// Two clients in ServeGen's form: one even, one that comes in bursts and only from the tenth minute on.
fn clients(folder: &Folder) -> String {
    let lengths = r#"{"0": {"input_tokens": "{200: 0.5, 900: 0.5}", "output_tokens": "{20: 1.0}"}}"#;
    folder.write("chunk-3-trace.csv", "0,2,1,Gamma,1,0.5\n600,2,1,Gamma,1,0.5\n");
    folder.write("chunk-3-dataset.json", lengths);
    folder.write("chunk-12-trace.csv", "0,,,,,\n600,6,3,Gamma,0.11,1.5\n");
    folder.write("chunk-12-dataset.json", lengths);
    folder.0.path().display().to_string()
}

#[test]
fn a_mix_of_clients_is_drawn_from() {
    let folder = Folder::new();
    let mix = clients(&folder);
    let requests = |arguments: &[&str]| {
        let all = [&["--trace", mix.as_str(), "--engines", "2", "--json", "-"], arguments].concat();
        let document: Value = serde_json::from_str(&simulate(&all).ok().out).expect("JSON");
        document["runs"][0]["summary"]["requests"].as_u64().expect("a count")
    };
    // Deviations of sums of draws: some 5 % for the even one, some 15 % with the other one's bursts.
    assert!((100..=140).contains(&requests(&["--seconds", "60"])));
    let both = requests(&["--seconds", "60", "--from", "600"]);
    assert!((240..=800).contains(&both), "{both}");
    let scaled = requests(&["--seconds", "60", "--rate", "4"]);
    assert!((190..=290).contains(&scaled), "{scaled}");
    let fast = requests(&["--seconds", "30", "--speed", "x4"]);
    assert!((190..=290).contains(&fast), "{fast}");
}

#[test]
fn what_is_wrong_with_a_mix_of_clients_is_named() {
    let folder = Folder::new();
    let mix = clients(&folder);
    let check = |arguments: &[&str], expected: &str| {
        let ran = simulate(&[&["--trace", mix.as_str()], arguments].concat());
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.err.contains(expected), "{}", ran.err);
    };
    check(&["--form", "azure"], "a directory holds a mix of clients");
    check(&["--rate", "1000000"], "give --rate or --seconds");
    check(&["--from", "500", "--seconds", "0.0001", "--rate", "0.001"], "nothing was drawn");
    check(&["--from", "1200"], "its windows end at 1200 s");
    folder.write("chunk-4-trace.csv", "0,1,1,Gamma,1,1");
    check(&[], "chunk-4-dataset.json");
    folder.write("chunk-4-dataset.json", "[]");
    check(&[], "line 1, column 1: invalid type: sequence");
    folder.write("chunk-3-trace.csv", "0,2,1,Gamma,1");
    check(&[], "line 1, column 1: expected 6 fields");
    let empty = tempfile::tempdir().expect("a folder of its own");
    let ran = simulate(&["--trace", &empty.path().display().to_string()]);
    assert!(ran.err.contains("no chunk-N-trace.csv in it"), "{}", ran.err);
}
