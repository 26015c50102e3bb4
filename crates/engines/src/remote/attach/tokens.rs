//! Token ids: whether an engine takes and answers them, and whether its tokenizer is ours.
//!
//! Where both hold, text is turned into tokens once, by the gateway. Where the tokenizers differ in anything that was
//! tried, the engine is given text: wrong tokens would be answered fluently.

use forebay_engine_wire::discovery::Server;
use forebay_types::TokenId;
use serde_json::{Value, json};

use super::{
    AttachSettings, AttachSpec, Found,
    probe::{Probe, reason, status},
};
use crate::{
    driver::{Audit, ClientBody, ClientRoute},
    remote::{
        Dialect, HandOver, Speech,
        client::{Endpoint, HttpError},
        findings::Findings,
    },
};

/// The gateway's tokenizer and chat template, as they would be used for a request.
pub trait TokenizerProbe: Send + Sync {
    /// The tokens of `text` as the prompt of a completion.
    ///
    /// # Errors
    /// If it cannot be tokenised, as a sentence.
    fn prompt(&self, text: &str) -> Result<Vec<TokenId>, String>;

    /// The tokens of a chat of (role, content), with what invites the answer.
    ///
    /// # Errors
    /// If there is no template, or it refuses such a chat, as a sentence.
    fn chat(&self, messages: &[(&str, &str)]) -> Result<Vec<TokenId>, String>;

    /// Whether it is to be compared with the engine's. Not by an agent, whose gateways bring tokenizers of their own and
    /// compare them when the engine joins ([`tokenizers_agree`]).
    fn is_compared(&self) -> bool {
        true
    }
}

/// Stands for the tokenizers of the gateways that an agent's engine will join.
#[derive(Debug, Clone, Copy)]
pub struct ComparedByGateways;

impl TokenizerProbe for ComparedByGateways {
    fn prompt(&self, _text: &str) -> Result<Vec<TokenId>, String> {
        Err("the gateways have it".to_owned())
    }

    fn chat(&self, _messages: &[(&str, &str)]) -> Result<Vec<TokenId>, String> {
        Err("the gateways have it".to_owned())
    }

    fn is_compared(&self) -> bool {
        false
    }
}

/// Compares an engine's tokenizer and template with ours, for an engine that was attached elsewhere.
///
/// # Errors
/// A sentence: what they disagree on, or why they cannot be compared.
pub async fn tokenizers_agree(
    endpoint: &Endpoint,
    speech: &Speech,
    ours: &dyn TokenizerProbe,
    settings: &AttachSettings,
) -> Result<(), String> {
    let probe = Probe::new(endpoint, settings);
    let takes_chats = speech.dialect == Dialect::Vllm;
    compare(&probe, &speech.model, takes_chats, ours).await?;
    if !takes_chats && !matches!(speech.hand_over, HandOver::Bootstrap { .. }) {
        compare_chat_lengths(&probe, &speech.model, ours).await?;
    }
    Ok(())
}

/// Separates what is computed for a probe from everybody's prefix cache.
pub(super) const PROBE_SALT: &str = "forebay-probe";

/// What tokenizers disagree on, if on anything: spaces, line ends, digits, composed and decomposed letters, scripts
/// without spaces, emoji of several code points, code, and texts that some models have tokens of their own for.
const TEXTS: [&str; 8] = [
    "The quick brown fox jumps over the lazy dog.",
    "  two leading spaces, a tab\there,\r\nand\n\n\nline ends  ",
    "In 2024, 1234567890 of 3.14159 (about 12 %) cost $1,000.00.",
    "Ünïcödé, cafe\u{301} and café, Straße, naïve",
    "東京は日本の首都です。서울은 대한민국의 수도이다. العربية ไทย",
    "family 👩‍👩‍👧‍👦, thumbs 👍🏽, flags 🇫🇷\u{200b}\u{fe0f}",
    "def f(x):\n    return {\"a\": [x ** 2, '\\\\n']}  # done\n",
    "<|im_start|>user\nhi<|im_end|><|endoftext|><s>[INST] x [/INST]</s><|eot_id|><bos><think>",
];

/// Chats whose templates differ, if any do.
const CHATS: [&[(&str, &str)]; 3] = [
    &[("user", "Hello there!")],
    &[("system", "Answer in one word. "), ("user", "  What is 2 + 2?\n")],
    &[("user", "Remember: naïve 東京."), ("assistant", "I shall."), ("user", "What was it?")],
];

/// Token ids that every vocabulary has.
pub(super) fn sample(tokenizer: Option<&dyn TokenizerProbe>) -> Vec<TokenId> {
    let tokens = tokenizer.and_then(|tokenizer| tokenizer.prompt("Hello there").ok());
    tokens.filter(|tokens| !tokens.is_empty()).unwrap_or_else(|| vec![10, 11, 12])
}

/// A list of token ids, and of nothing else.
pub(super) fn token_ids(value: Option<&Value>) -> Option<Vec<TokenId>> {
    let ids = value?.as_array()?;
    ids.iter().map(|id| id.as_u64().and_then(|id| TokenId::try_from(id).ok())).collect()
}

/// Compares the engine's tokenizer and template with ours. A finding says what keeps tokens from being used.
pub(super) async fn agree(
    probe: &Probe<'_>,
    found: &Found,
    spec: &AttachSpec,
    findings: &mut Findings,
) -> bool {
    let Some(ours) = spec.tokenizer.as_deref() else {
        findings.regret("there is no tokenizer for its model here: it is given text");
        return false;
    };
    if !ours.is_compared() {
        return true;
    }
    let takes_chats = found.server == Server::Vllm;
    said(compare(probe, &found.model.id, takes_chats, ours).await, findings)
}

fn said(compared: Result<(), String>, findings: &mut Findings) -> bool {
    compared.map_err(|why| findings.regret(format!("{why}: it is given text, not tokens"))).is_ok()
}

async fn compare(
    probe: &Probe<'_>,
    model: &str,
    takes_chats: bool,
    ours: &dyn TokenizerProbe,
) -> Result<(), String> {
    let mut comparisons: Vec<(String, Value, Result<Vec<TokenId>, String>)> = Vec::new();
    for text in TEXTS {
        let question = json!({"model": model, "prompt": text});
        comparisons.push((format!("the text {text:?}"), question, ours.prompt(text)));
    }
    // SGLang's route takes no chats: see `chat_lengths_agree`.
    for chat in CHATS.iter().filter(|_| takes_chats) {
        let question = json!({"model": model, "messages": messages(chat), "add_generation_prompt": true});
        comparisons.push((format!("the chat {chat:?}"), question, ours.chat(chat)));
    }
    for (what, question, ours) in comparisons {
        let theirs = match probe.ask("/tokenize", &question).await {
            Ok(answer) => match token_ids(answer.get("tokens")) {
                Some(tokens) => Ok(tokens),
                None => return Err("its /tokenize answers no tokens".to_owned()),
            },
            // It refuses this text or chat; that there is no such route is another matter.
            Err(error) if matches!(status(&error), Some(400 | 422)) => Err(reason(&error)),
            Err(error) => return Err(format!("its tokenizer cannot be compared: {}", reason(&error))),
        };
        if let Some(difference) = difference(&ours, &theirs) {
            return Err(format!("its tokenizer disagrees with ours on {what}: {difference}"));
        }
    }
    Ok(())
}

/// Compares what a chat's prompt is long by the engine's own count, for engines that tokenise no chats on demand.
pub(super) async fn chat_lengths_agree(
    probe: &Probe<'_>,
    found: &Found,
    spec: &AttachSpec,
    findings: &mut Findings,
) -> bool {
    let Some(ours) = spec.tokenizer.as_deref() else {
        return false;
    };
    !ours.is_compared() || said(compare_chat_lengths(probe, &found.model.id, ours).await, findings)
}

async fn compare_chat_lengths(
    probe: &Probe<'_>,
    model: &str,
    ours: &dyn TokenizerProbe,
) -> Result<(), String> {
    for chat in CHATS {
        let question = json!({"model": model, "messages": messages(chat), "max_tokens": 1, "temperature": 0});
        let theirs = match probe.ask("/v1/chat/completions", &question).await {
            Ok(answer) => answer.pointer("/usage/prompt_tokens").and_then(Value::as_u64),
            Err(HttpError::Status { status: 400 | 422, .. }) => None,
            Err(error) => return Err(format!("its template cannot be compared: {}", reason(&error))),
        };
        let ours = ours.chat(chat).ok().map(|tokens| tokens.len() as u64);
        if ours != theirs {
            let said = |tokens: Option<u64>| tokens.map_or("none".to_owned(), |tokens| tokens.to_string());
            let (theirs, ours) = (said(theirs), said(ours));
            return Err(format!(
                "its template disagrees with ours on {chat:?}: {theirs} tokens there, {ours} here"
            ));
        }
    }
    Ok(())
}

/// The question that `/tokenize` is asked about a client's body. `None`: it takes no such thing.
pub(in crate::remote) fn tokenize_question(speech: &Speech, body: &ClientBody) -> Option<Value> {
    let is_text = || body.json.get("prompt").is_some_and(|prompt| prompt.starts_with(b"\""));
    let kept: &[&str] = match body.route {
        ClientRoute::Completions if is_text() => &["prompt", "add_special_tokens"],
        // SGLang's route takes no chats.
        ClientRoute::Chat if speech.dialect == Dialect::Vllm => {
            &["messages", "tools", "chat_template", "chat_template_kwargs", "add_generation_prompt"]
        }
        ClientRoute::Completions | ClientRoute::Chat => return None,
    };
    let mut question = json!({"model": speech.model});
    for name in kept {
        if let Some(value) = body.json.get(name) {
            question[name] = serde_json::from_slice(value).ok()?;
        }
    }
    Some(question)
}

/// Asks an engine for the tokens of a client's words, and compares them with ours.
pub(in crate::remote) async fn audit(endpoint: &Endpoint, question: &Value, ours: &[TokenId]) -> Audit {
    let settings = AttachSettings::default();
    let answer = Probe::new(endpoint, &settings).ask("/tokenize", question).await;
    let Some(theirs) = answer.ok().and_then(|answer| token_ids(answer.get("tokens"))) else {
        return Audit::Unanswered;
    };
    match difference(&Ok(ours.to_vec()), &Ok(theirs)) {
        None => Audit::Agrees,
        Some(difference) => Audit::Differs(difference),
    }
}

fn messages(chat: &[(&str, &str)]) -> Vec<Value> {
    chat.iter().map(|(role, content)| json!({"role": role, "content": content})).collect()
}

/// The first difference, as the rest of a sentence.
fn difference(ours: &Result<Vec<TokenId>, String>, theirs: &Result<Vec<TokenId>, String>) -> Option<String> {
    let (ours, theirs) = match (ours, theirs) {
        (Ok(ours), Ok(theirs)) => (ours, theirs),
        (Err(_), Err(_)) => return None,
        (Ok(_), Err(why)) => return Some(format!("it refuses it with {why}")),
        (Err(why), Ok(_)) => return Some(format!("here it is refused, {why}")),
    };
    if let Some(index) = ours.iter().zip(theirs).position(|(ours, theirs)| ours != theirs) {
        return Some(format!("token {index} is {} there, {} here", theirs[index], ours[index]));
    }
    (ours.len() != theirs.len()).then(|| format!("{} tokens there, {} here", theirs.len(), ours.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_named() {
        let check = |ours: Result<&[TokenId], &str>, theirs: Result<&[TokenId], &str>, said: Option<&str>| {
            let own = |side: Result<&[TokenId], &str>| side.map(<[_]>::to_vec).map_err(str::to_owned);
            assert_eq!(difference(&own(ours), &own(theirs)).as_deref(), said);
        };
        check(Ok(&[1, 2, 3]), Ok(&[1, 2, 3]), None);
        check(Ok(&[1, 2, 3]), Ok(&[1, 5, 3]), Some("token 1 is 5 there, 2 here"));
        check(Ok(&[1, 2]), Ok(&[1, 2, 3]), Some("3 tokens there, 2 here"));
        check(Err("no template"), Err("status 400"), None);
        check(Ok(&[]), Err("status 400"), Some("it refuses it with status 400"));
        check(Err("no template"), Ok(&[1]), Some("here it is refused, no template"));
    }

    #[test]
    fn lists_of_token_ids_hold_nothing_else() {
        let ids = |value: Value| token_ids(Some(&value));
        assert_eq!(ids(json!([1, 2])), Some(vec![1, 2]));
        for other in [json!([1, "2"]), json!([-1]), json!([1.5]), json!(null), json!({"0": 1})] {
            assert_eq!(ids(other), None);
        }
    }
}
