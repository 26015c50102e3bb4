//! What is remembered of a conversation: a bounded list of messages.

use serde::Serialize;

/// Text that is kept and sent, in bytes: well below what servers take as a body.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// One message, as OpenAI servers take it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Message {
    role: &'static str,
    content: String,
}

/// A system prompt, then questions and answers in turn.
///
/// The system prompt is never dropped; the oldest question goes with its answer, so that the rest still reads as a
/// conversation. The last question is always kept, however long.
#[derive(Debug)]
pub(super) struct Conversation {
    messages: Vec<Message>,
    system: Option<String>,
    messages_max: usize,
}

impl Conversation {
    /// An empty one that will keep `messages_max` messages beside the system prompt.
    pub(super) fn new(system: Option<String>, messages_max: usize) -> Self {
        let mut conversation = Self { messages: Vec::new(), system, messages_max };
        conversation.reset();
        conversation
    }

    /// What to send.
    pub(super) fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Adds a question. Whether older messages had to go.
    pub(super) fn ask(&mut self, question: String) -> bool {
        self.messages.push(Message { role: "user", content: question });
        let first = usize::from(self.system.is_some());
        let mut dropped = false;
        while self.messages.len() > first + 1 && self.is_too_much(first) {
            // A question and its answer.
            self.messages.drain(first..first + 2);
            dropped = true;
        }
        dropped
    }

    fn is_too_much(&self, first: usize) -> bool {
        let bytes: usize = self.messages.iter().map(|message| message.content.len()).sum();
        self.messages.len() - first > self.messages_max || bytes > TEXT_BYTES_MAX
    }

    /// Adds the answer to the last question.
    pub(super) fn answered(&mut self, answer: String) {
        self.messages.push(Message { role: "assistant", content: answer });
    }

    /// Forgets the last question, which got no whole answer.
    pub(super) fn withdraw(&mut self) {
        if self.messages.last().is_some_and(|message| message.role == "user") {
            self.messages.pop();
        }
    }

    /// Forgets everything but the system prompt.
    pub(super) fn reset(&mut self) {
        self.messages.clear();
        let system = self.system.clone().map(|content| Message { role: "system", content });
        self.messages.extend(system);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(conversation: &Conversation) -> Vec<&str> {
        conversation.messages().iter().map(|message| message.content.as_str()).collect()
    }

    #[test]
    fn questions_and_answers_are_kept_in_turn_and_the_oldest_go_in_pairs() {
        let mut conversation = Conversation::new(Some("be brief".to_owned()), 4);
        for turn in 0..3 {
            let dropped = conversation.ask(format!("q{turn}"));
            assert_eq!(dropped, turn == 2, "turn {turn}");
            conversation.answered(format!("a{turn}"));
        }
        assert_eq!(texts(&conversation), ["be brief", "q1", "a1", "q2", "a2"]);
        conversation.reset();
        assert_eq!(texts(&conversation), ["be brief"]);
    }

    #[test]
    fn a_long_text_pushes_out_the_rest_but_is_itself_kept() {
        let mut conversation = Conversation::new(None, 100);
        assert!(!conversation.ask("short".to_owned()));
        conversation.answered("answer".to_owned());
        let long = "x".repeat(TEXT_BYTES_MAX + 1);
        assert!(conversation.ask(long.clone()));
        assert_eq!(texts(&conversation), [long.as_str()]);
    }

    #[test]
    fn a_question_without_an_answer_is_withdrawn() {
        let mut conversation = Conversation::new(None, 100);
        conversation.ask("one".to_owned());
        conversation.withdraw();
        conversation.withdraw();
        assert!(conversation.messages().is_empty());
        conversation.ask("two".to_owned());
        conversation.answered("2".to_owned());
        conversation.withdraw();
        assert_eq!(texts(&conversation), ["two", "2"]);
    }
}
