//! `forebay chat`: a conversation in the terminal, with Forebay or any OpenAI-compatible server.
//!
//! In: lines from a person, a pipe or `-m`. Out: answers as they stream, on standard output; everything else on standard
//! error. Start at [`run`]; [`conversation`] is what is remembered, [`answer`] one question and its answer, [`input`]
//! where lines come from.
//!
//! Invariants: Ctrl-C while an answer streams cancels that answer, at the server too; an answer that was cancelled or
//! broke is not remembered, and neither is its question.

mod answer;
mod conversation;
mod input;

use std::{collections::BTreeMap, io::Read as _};

use anyhow::Context as _;
use serde::Deserialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    cli::ChatArgs,
    client::Client,
    exit::{Exit, Failed, describe, is_broken_pipe},
    explain,
    settings::nearest,
    terminal::{Terminal, Tone, without_controls},
};
use answer::{Answer, End, Question};
use conversation::Conversation;
use input::{Input, Line};

/// A question read from standard input has this many bytes at most.
const STDIN_BYTES_MAX: u64 = 16 << 20;

const HELP: &str = "\
/help     this list
/reset    forget the conversation
/explain  why the last request ran where it ran (Forebay only)
Ctrl-C stops an answer, Ctrl-D leaves.
";

/// A model as servers list it.
#[derive(Debug, Deserialize)]
struct Model {
    id: String,
}

/// Answers one question or talks until the end of input.
///
/// # Errors
/// No server, a server without models, or, for a single question, no whole answer.
pub(crate) async fn run(
    args: &ChatArgs,
    environment: &BTreeMap<String, String>,
    terminal: Terminal,
) -> anyhow::Result<Exit> {
    let key = environment.get("FOREBAY_API_KEY").filter(|key| !key.is_empty()).cloned();
    let client = Client::new(&args.url, key)?;
    let admin = Client::new(&args.admin_url, None)?;
    let message = args.message.as_deref().map(whole_message).transpose()?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None => first_model(&client).await?,
    };
    let interrupts = signal(SignalKind::interrupt()).context("cannot listen to Ctrl-C")?;
    let conversation = Conversation::new(args.system.clone(), args.history_max as usize);
    let mut session =
        Session { args, client, admin, model, terminal, interrupts, conversation, last_id: None };
    match message {
        Some(message) => session.answer_once(message).await,
        None => session.talk().await,
    }
}

/// The question of `-m`, or standard input for `-m -`.
fn whole_message(message: &str) -> anyhow::Result<String> {
    if message != "-" {
        return Ok(message.to_owned());
    }
    let mut text = String::new();
    let read = std::io::stdin().take(STDIN_BYTES_MAX + 1).read_to_string(&mut text);
    let length = read.context("cannot read the question from standard input")? as u64;
    if length > STDIN_BYTES_MAX {
        let sentence = format!("the question on standard input is longer than {STDIN_BYTES_MAX} bytes");
        return Err(Failed { exit: Exit::Usage, sentence }.into());
    }
    Ok(text)
}

async fn first_model(client: &Client) -> anyhow::Result<String> {
    let models: Vec<Model> = client.get_list("/v1/models").await?;
    models.into_iter().next().map(|model| model.id).ok_or_else(|| {
        let sentence =
            format!("{} serves no model now; `forebay status` shows its engines", client.authority());
        Failed { exit: Exit::NotFound, sentence }.into()
    })
}

/// One run of the command.
struct Session<'a> {
    args: &'a ChatArgs,
    client: Client,
    admin: Client,
    model: String,
    terminal: Terminal,
    interrupts: Signal,
    conversation: Conversation,
    /// The id of the last request, for `/explain`.
    last_id: Option<String>,
}

/// What to do after a line.
enum Next {
    Continue,
    Leave(Exit),
}

impl Session<'_> {
    /// One question; only its answer goes to standard output.
    async fn answer_once(&mut self, message: String) -> anyhow::Result<Exit> {
        self.conversation.ask(message);
        let mut answer = Answer::default();
        let end = self.receive(&mut answer).await;
        if end.is_ok() || !answer.text.is_empty() {
            self.terminal.out("\n")?;
        }
        match end? {
            End::Whole => Ok(Exit::Ok),
            End::Interrupted => Ok(Exit::Interrupted),
        }
    }

    /// Line after line until the end of input.
    async fn talk(&mut self) -> anyhow::Result<Exit> {
        let mut input = Input::start();
        if input.is_terminal() {
            let greeting = format!(
                "{} at {}. /help lists the commands, Ctrl-D leaves.",
                without_controls(&self.model),
                self.client.authority()
            );
            self.remark(&greeting);
        }
        loop {
            let line = tokio::select! {
                line = input.next() => line?,
                // A terminal's line editor sees Ctrl-C itself, and has the terminal in raw mode: it must not be left so.
                _ = self.interrupts.recv(), if !input.is_terminal() => return Ok(Exit::Interrupted),
            };
            let next = match line {
                Line::Text(text) => self.take(text.trim()).await?,
                Line::Interrupted => {
                    self.remark("Ctrl-D leaves.");
                    Next::Continue
                }
                Line::End => Next::Leave(Exit::Ok),
            };
            if let Next::Leave(exit) = next {
                return Ok(exit);
            }
        }
    }

    async fn take(&mut self, text: &str) -> anyhow::Result<Next> {
        match text {
            "" => {}
            "/help" => self.terminal.err(HELP),
            "/reset" => {
                self.conversation.reset();
                self.remark("The conversation is forgotten.");
            }
            "/explain" => self.explain().await,
            _ if text.starts_with('/') => {
                let near = nearest(text, ["/help", "/reset", "/explain"]).unwrap_or("/help");
                self.remark(&format!("There is no {text}; did you mean {near}?"));
            }
            _ => return self.converse(text.to_owned()).await,
        }
        Ok(Next::Continue)
    }

    async fn converse(&mut self, text: String) -> anyhow::Result<Next> {
        if self.conversation.ask(text) {
            self.remark("(The oldest messages no longer fit and were left out.)");
        }
        let mut answer = Answer::default();
        match self.receive(&mut answer).await {
            Ok(end) => {
                self.terminal.out("\n")?;
                let mut figures = answer.figures();
                match end {
                    End::Whole => self.conversation.answered(answer.text),
                    End::Interrupted => {
                        self.conversation.withdraw();
                        figures.insert_str(0, "stopped; ");
                    }
                }
                self.remark(&figures);
            }
            Err(error) if is_broken_pipe(&error) => return Err(error),
            Err(error) => {
                self.conversation.withdraw();
                if !answer.text.is_empty() {
                    self.terminal.out("\n")?;
                }
                let label = self.terminal.paint_err.tone(Tone::Bad, "error:");
                self.terminal.err(&format!("{label} {}\n", describe(&error)));
            }
        }
        Ok(Next::Continue)
    }

    /// Asks the conversation's last question and streams the answer to standard output. What came is in `answer` even
    /// if the rest did not.
    async fn receive(&mut self, answer: &mut Answer) -> anyhow::Result<End> {
        let question = Question {
            model: &self.model,
            messages: self.conversation.messages(),
            temperature: self.args.temperature,
            max_tokens: self.args.max_tokens,
            seed: self.args.seed,
        };
        let terminal = self.terminal;
        let mut show = |text: &str| {
            if terminal.out_is_terminal { terminal.out(&without_controls(text)) } else { terminal.out(text) }
        };
        let request_id = self.args.request_id.as_deref();
        let end = answer.receive(&self.client, &question, request_id, &mut self.interrupts, &mut show).await;
        self.last_id = answer.request_id.clone().or_else(|| self.last_id.take());
        end
    }

    async fn explain(&self) {
        let Some(id) = &self.last_id else {
            return self.remark("There is no request to explain yet.");
        };
        let (width, paint) = (self.terminal.width(), self.terminal.paint_err);
        match explain::text(&self.admin, id, width, paint).await {
            Ok(text) => self.terminal.err(&text),
            Err(error) => self.remark(&describe(&error)),
        }
    }

    /// Says something beside the conversation.
    fn remark(&self, text: &str) {
        self.terminal.err(&format!("{}\n", self.terminal.paint_err.tone(Tone::Faint, text)));
    }
}
