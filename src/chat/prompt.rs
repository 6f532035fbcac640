//! Which messages go into a prompt: the system prompt, the newest message, and as much recent history as fits.
//!
//! Invariant: system + history + newest ≤ the model's window less the output's share, by the upper estimate; history is a
//! contiguous tail of the path and begins with a question. PURE.

use crate::error::ApiError;
use crate::llm::{PromptMessage, Speaker, tokens};

/// A prompt being filled, newest history first.
pub struct Window {
    system: Option<PromptMessage>,
    newest: PromptMessage,
    /// History, newest first.
    history: Vec<PromptMessage>,
    left: u64,
}

impl Window {
    /// A window of `context_window` tokens of which `output` are the answer's.
    ///
    /// # Errors
    /// 400/3522 when the newest message alone does not fit.
    pub fn new(context_window: u64, output: u64, system: Option<&str>, newest: &str) -> Result<Self, ApiError> {
        let message = |role, content: &str| PromptMessage { role, content: content.to_owned() };
        let system = system.filter(|text| !text.trim().is_empty()).map(|text| message(Speaker::System, text));
        let newest = message(Speaker::User, newest);
        let room = context_window.saturating_sub(output);
        let fixed: Vec<PromptMessage> = system.iter().cloned().chain([newest.clone()]).collect();
        let needed = tokens::upper_prompt(&fixed);
        let left = room.checked_sub(needed).ok_or_else(|| ApiError::context_too_long(needed, room))?;
        Ok(Self { system, newest, history: Vec::new(), left })
    }

    /// Takes the next older message; false when it does not fit, and then nothing older is wanted.
    pub fn take(&mut self, message: PromptMessage) -> bool {
        let needed = tokens::upper_message(&message.content);
        match self.left.checked_sub(needed) {
            Some(left) => {
                self.left = left;
                self.history.push(message);
                true
            }
            None => false,
        }
    }

    /// The prompt, oldest first.
    #[must_use]
    pub fn finish(mut self) -> Vec<PromptMessage> {
        while self.history.last().is_some_and(|oldest| oldest.role == Speaker::Assistant) {
            self.history.pop();
        }
        self.system.into_iter().chain(self.history.into_iter().rev()).chain([self.newest]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(at: usize) -> PromptMessage {
        let role = if at.is_multiple_of(2) { Speaker::Assistant } else { Speaker::User };
        PromptMessage { role, content: format!("第{at}句话说得不长也不短") }
    }

    #[test]
    fn history_fills_the_window_from_its_end() {
        for context in [100_u64, 200, 300, 1_000, 10_000] {
            let mut window = Window::new(context, 50, Some("你是编辑"), "继续写").unwrap();
            let taken = (0..400).take_while(|at| window.take(turn(*at))).count();
            let prompt = window.finish();
            assert!(tokens::upper_prompt(&prompt) + 50 <= context);
            assert_eq!(prompt.first().unwrap().role, Speaker::System);
            assert_eq!(prompt.last().unwrap().content, "继续写");
            assert!(prompt.len() == 2 || prompt[1].role == Speaker::User, "history begins with a question");
            assert!(taken - (prompt.len() - 2) <= 1);
        }
    }

    #[test]
    fn a_message_that_does_not_fit_is_refused() {
        let long = "字".repeat(1_000);
        assert_eq!(Window::new(1_000, 100, None, &long).err().unwrap().code, 3522);
        assert!(Window::new(2_000, 100, None, &long).is_ok());
        assert_eq!(Window::new(100, 100, None, "字").err().unwrap().code, 3522);
    }
}
