//! From a request to a job: which model, how much output, which prompt. PURE.
//!
//! Invariant: everything that can be refused without spending is refused here, by field.

use serde::{Deserialize, Serialize};

use super::settings::{MAX_TOKENS_DEFAULT, Settings, TEMPERATURE_DEFAULT};
use crate::config::{Config, Model};
use crate::error::ApiError;
use crate::llm::{PromptMessage, Sampling, Speaker};

/// Client-held turns that are used at most.
const HISTORY_MAX: usize = 20;
/// Longest title made from a message, characters.
const TITLE_CHARS_MAX: usize = 30;
/// Longest title, tag and most tags a user may set.
const TITLE_SET_CHARS_MAX: usize = 200;
const TAG_CHARS_MAX: usize = 50;
const TAGS_MAX: usize = 20;

/// A turn the client holds (contract 2.2 `history`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClientMessage {
    /// `user` or `assistant`.
    #[serde(default)]
    pub role: String,
    /// What was said.
    #[serde(default)]
    pub content: String,
}

/// The model a turn runs on and what it asks of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The catalogue's row.
    pub model: Model,
    /// Most output, tokens.
    pub max_output: u64,
    /// Sampling.
    pub sampling: Sampling,
    /// Instructions.
    pub system_prompt: Option<String>,
}

/// Decides model, output and sampling: the call's options over the session's settings over the defaults.
///
/// # Errors
/// 400/1001 for a value out of range, 404/3530 for an unknown model.
pub fn plan(config: &Config, session: &Settings, options: &Settings) -> Result<Plan, ApiError> {
    options.check("options")?;
    let settings = session.overlaid(options);
    let model = config.model(settings.model.as_deref().unwrap_or(&config.default_model))?.clone();
    let wanted = settings.max_tokens.and_then(|tokens| u64::try_from(tokens).ok()).filter(|tokens| *tokens > 0);
    let max_output = wanted.unwrap_or(MAX_TOKENS_DEFAULT).min(model.max_output);
    let sampling = Sampling {
        temperature: settings.temperature.or(Some(TEMPERATURE_DEFAULT)),
        top_p: settings.top_p,
        frequency_penalty: settings.frequency_penalty,
        presence_penalty: settings.presence_penalty,
    };
    Ok(Plan { model, max_output, sampling, system_prompt: settings.system_prompt })
}

/// The author's message, under either of its names, checked.
///
/// # Errors
/// 400/1001 when it is missing or empty.
pub fn checked_message(message: Option<String>, content: Option<String>) -> Result<String, ApiError> {
    message.or(content).filter(|text| !text.trim().is_empty()).ok_or_else(|| ApiError::invalid("message", "不能为空"))
}

/// Client-held turns, checked: who spoke must be known. (`system` is taken, and passed over: instructions come from the
/// session's settings.)
///
/// # Errors
/// 400/1001 naming the turn.
pub fn checked_history(history: &[ClientMessage]) -> Result<(), ApiError> {
    match history.iter().position(|message| !["user", "assistant", "system"].contains(&message.role.as_str())) {
        None => Ok(()),
        Some(at) => Err(ApiError::invalid(&format!("history[{at}].role"), "必须是 user 或 assistant")),
    }
}

/// Client-held turns as prompt messages, newest first; a last turn that repeats the question is the question.
#[must_use]
pub fn client_history(history: &[ClientMessage], question: &str) -> Vec<PromptMessage> {
    let mut messages: Vec<PromptMessage> = history
        .iter()
        .rev()
        .filter_map(|message| {
            let role = match message.role.as_str() {
                "user" => Speaker::User,
                "assistant" => Speaker::Assistant,
                _ => return None,
            };
            (!message.content.trim().is_empty()).then(|| PromptMessage { role, content: message.content.clone() })
        })
        .take(HISTORY_MAX)
        .collect();
    if messages.first().is_some_and(|newest| newest.role == Speaker::User && newest.content == question) {
        messages.remove(0);
    }
    messages
}

/// A session's title from its first message: its first line, shortened.
#[must_use]
pub fn title_of(message: &str) -> String {
    let line = message.trim().lines().next().unwrap_or_default().trim();
    let short: String = line.chars().filter(|c| !c.is_control()).take(TITLE_CHARS_MAX).collect();
    if line.chars().count() > TITLE_CHARS_MAX { format!("{short}…") } else { short }
}

/// Checks what a user may set on a session.
///
/// # Errors
/// 400/1001 naming the field; 404/3530 for an unknown model.
pub fn check_patch(config: &Config, patch: &super::Patch) -> Result<(), ApiError> {
    patch.settings.check("settings")?;
    if let Some(model) = &patch.settings.model {
        config.model(model)?;
    }
    if let Some(title) = &patch.title
        && (title.trim().is_empty() || title.chars().count() > TITLE_SET_CHARS_MAX)
    {
        return Err(ApiError::invalid("title", format!("长度必须在 1 到 {TITLE_SET_CHARS_MAX} 个字符之间")));
    }
    if let Some(tags) = &patch.tags {
        let fits = |tag: &String| !tag.trim().is_empty() && tag.chars().count() <= TAG_CHARS_MAX;
        if tags.len() > TAGS_MAX || !tags.iter().all(fits) {
            return Err(ApiError::invalid("tags", format!("最多 {TAGS_MAX} 个，每个 1 到 {TAG_CHARS_MAX} 个字符")));
        }
    }
    if patch.status == Some(super::Status::Deleted) {
        return Err(ApiError::invalid("status", "必须是 active 或 archived，删除请用 DELETE"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_are_one_short_line() {
        assert_eq!(title_of("  写一个开头\n要有雨  "), "写一个开头");
        assert_eq!(title_of(&"长".repeat(40)), format!("{}…", "长".repeat(30)));
    }

    #[test]
    fn client_history_is_newest_first_and_does_not_repeat_the_question() {
        let said = |role: &str, content: &str| ClientMessage { role: role.to_owned(), content: content.to_owned() };
        let history = [said("user", "甲"), said("assistant", "乙"), said("system", "x"), said("user", "丙"), said("user", "问")];
        let contents: Vec<String> = client_history(&history, "问").into_iter().map(|m| m.content).collect();
        assert_eq!(contents, ["丙", "乙", "甲"]);
        let many: Vec<ClientMessage> = (0..50).map(|at| said("user", &at.to_string())).collect();
        assert_eq!(client_history(&many, "问").len(), HISTORY_MAX);
    }
}
