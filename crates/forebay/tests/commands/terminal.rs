//! What changes when a person sits at a terminal: colour, width, prompts. Each test has a pseudo-terminal of its own.

use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    process::{Child, Command, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::support::{Reply, Server, forebay};

const ENGINES: &str = include_str!("../fixtures/engines.json");

/// The person's side of a terminal.
struct Person {
    master: File,
    child: Child,
    /// What came on the screen.
    seen: String,
    /// How much of it was waited for.
    noticed: usize,
}

impl Person {
    /// Starts `command` at a new terminal of 100 columns.
    fn at(mut command: Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo-terminal");
        grantpt(&master).expect("its grant");
        unlockpt(&master).expect("its lock");
        tcsetwinsize(&master, Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 })
            .expect("its size");
        let path = ptsname(&master, Vec::new()).expect("its name").into_string().expect("text");
        let side =
            || Stdio::from(OpenOptions::new().read(true).write(true).open(&path).expect("its other side"));
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().expect("the binary runs");
        // Our copies of the other side must go, or its end would never be seen.
        drop(command);
        Self { master: File::from(master), child, seen: String::new(), noticed: 0 }
    }

    /// Reads until `text` comes on the screen, after what was waited for before.
    fn sees(&mut self, text: &str) {
        loop {
            if let Some(at) = self.seen[self.noticed..].find(text) {
                self.noticed += at + text.len();
                return;
            }
            assert!(self.reads_on(), "the screen ended before {text:?}: {:?}", self.seen);
        }
    }

    /// Takes what comes next; `false` at the end.
    fn reads_on(&mut self) -> bool {
        let mut ready = [PollFd::new(&self.master, PollFlags::IN)];
        let patience = Timespec { tv_sec: 30, tv_nsec: 0 };
        assert_ne!(poll(&mut ready, Some(&patience)), Ok(0), "nothing came for 30 s after {:?}", self.seen);
        let mut bytes = [0; 4_096];
        // The other side closes with an error (EIO) on Linux.
        let length = self.master.read(&mut bytes).unwrap_or(0);
        self.seen.push_str(&String::from_utf8_lossy(&bytes[..length]));
        length > 0
    }

    fn types(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("the terminal takes keys");
    }

    /// Everything on the screen at the end, and the exit code.
    fn leaves(mut self) -> (String, i32) {
        while self.reads_on() {}
        (self.seen, self.child.wait().expect("the binary ends").code().expect("an exit"))
    }
}

fn fleet() -> Server {
    let engines = format!(r#"{{"object":"list","data":{ENGINES}}}"#);
    Server::with_pages(&[("GET /fleet/v1/engines", Reply::json(&engines))])
}

#[test]
fn color_is_for_terminals_that_want_it() {
    let server = fleet();
    let check = |variables: &[(&str, &str)], flag: &str, expected: bool| {
        let mut command = forebay(&["status", flag, "--admin-url", &server.url]);
        command.envs(variables.iter().copied());
        let (screen, code) = Person::at(command).leaves();
        assert_eq!(code, 0, "{screen}");
        assert_eq!(screen.contains("\x1b[32mready\x1b[0m"), expected, "{variables:?} {flag}: {screen:?}");
    };
    check(&[("TERM", "xterm")], "--color=auto", true);
    check(&[("TERM", "xterm"), ("NO_COLOR", "1")], "--color=auto", false);
    check(&[("TERM", "xterm"), ("NO_COLOR", "")], "--color=auto", true);
    check(&[("TERM", "dumb")], "--color=auto", false);
    check(&[("TERM", "xterm")], "--color=never", false);
    check(&[("TERM", "xterm"), ("NO_COLOR", "1")], "--color=always", true);
}

#[test]
fn color_in_a_pipe_is_only_for_those_who_insist() {
    let server = fleet();
    let colored = |flag: &str| {
        let output =
            forebay(&["status", flag, "--admin-url", &server.url]).output().expect("the binary runs");
        String::from_utf8(output.stdout).expect("text").contains('\x1b')
    };
    assert!(!colored("--color=auto"));
    assert!(colored("--color=always"));
}

#[test]
fn help_honours_no_color_too() {
    let help = |variables: &[(&str, &str)]| {
        let mut command = forebay(&["--help"]);
        command.env("TERM", "xterm").envs(variables.iter().copied());
        Person::at(command).leaves().0
    };
    assert!(help(&[]).contains('\x1b'));
    assert!(!help(&[("NO_COLOR", "1")]).contains('\x1b'));
}

#[test]
fn tables_fit_the_terminal() {
    let server = fleet();
    let mut command = forebay(&["status", "--admin-url", &server.url]);
    command.env("NO_COLOR", "1");
    let (screen, _) = Person::at(command).leaves();
    let table: Vec<_> = screen.lines().take_while(|line| !line.trim().is_empty()).collect();
    assert_eq!(table.len(), 3, "{screen:?}");
    for line in table {
        assert!(line.chars().count() <= 100, "{line}");
    }
}

#[test]
fn a_watched_terminal_is_redrawn_in_place() {
    let server = fleet();
    let mut person =
        Person::at(forebay(&["status", "--watch", "--interval", "1ms", "--admin-url", &server.url]));
    person.sees("\x1b[H\x1b[J");
    kill_process(Pid::from_child(&person.child), Signal::INT).expect("the watch lives");
    assert_eq!(person.leaves().1, 0);
}

#[test]
fn a_conversation_is_typed_edited_and_left_with_ctrl_d() {
    let piece = r#"{"choices":[{"index":0,"delta":{"content":"He\u001b[31mllo"}}]}"#;
    let server = Server::with_pages(&[
        ("GET /v1/models", Reply::json(r#"{"data":[{"id":"tiny"}]}"#)),
        ("POST /v1/chat/completions", Reply::events("req-1", &[piece, "[DONE]"])),
    ]);
    let mut command = forebay(&["chat", "--url", &server.url]);
    command.env("TERM", "xterm").env("NO_COLOR", "1");
    let mut person = Person::at(command);
    person.sees("tiny at 127.0.0.1:");
    person.sees("> ");
    // Ctrl-C at the prompt leaves nothing.
    person.types("\x03");
    person.sees("\nCtrl-D leaves.\r\n");
    person.sees("> ");
    // A typed line can be edited.
    person.types("hx\x7fi\r");
    person.sees("He[31mllo");
    person.sees("1 token, first after");
    // Ctrl-D means this only at a prompt: before, the terminal itself would take it.
    person.sees("> ");
    person.types("\x04");
    let (screen, code) = person.leaves();
    assert_eq!(code, 0, "{screen}");
    assert!(!screen.contains("\x1b[31m"), "an answer cannot steer the terminal: {screen:?}");
    let asked =
        server.requests().into_iter().find(|request| request.line.starts_with("POST")).expect("a question");
    assert!(asked.body.contains(r#""content":"hi""#), "{}", asked.body);
}
