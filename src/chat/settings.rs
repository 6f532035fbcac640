//! A session's settings and the checks every sampling option goes through.
//!
//! Invariant: a value outside its range is refused by name before anything is spent; only what the user set is stored, so
//! that defaults may change. PURE.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::ApiError;

/// Longest system prompt, characters.
const SYSTEM_PROMPT_CHARS_MAX: usize = 20_000;
/// Output when nobody says how much, tokens (the platform's own stub asks for as many).
pub const MAX_TOKENS_DEFAULT: u64 = 2_000;
/// Temperature of a session that sets none.
pub const TEMPERATURE_DEFAULT: f64 = 0.7;

/// What a session's user set, and what a call's `options` set for itself (contract 2.0); absent means default.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Settings {
    /// Catalogue id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// 0.0–2.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Most output, tokens.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "whole")]
    pub max_tokens: Option<i64>,
    /// 0.0–1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// −2.0–2.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frequency_penalty: Option<f64>,
    /// −2.0–2.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f64>,
    /// Instructions before every prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_prompt: Option<String>,
    /// In a call's `options` only: the answer is wanted as events. Never stored.
    #[serde(skip_serializing)]
    pub stream: Option<bool>,
}

/// A whole number, also one written as `100.0` (JavaScript knows no other).
fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    let Some(number) = Option::<f64>::deserialize(deserializer)? else { return Ok(None) };
    if number.fract() == 0.0 && number.abs() <= 9e15 { Ok(Some(number as i64)) } else { Err(D::Error::custom("expected 整数")) }
}

impl Settings {
    /// Checks ranges; `group` names the object the fields stand in (`settings`, `options`).
    ///
    /// # Errors
    /// 400/1001 naming the field.
    pub fn check(&self, group: &str) -> Result<(), ApiError> {
        within(group, "temperature", self.temperature, 0.0, 2.0)?;
        within(group, "topP", self.top_p, 0.0, 1.0)?;
        within(group, "frequencyPenalty", self.frequency_penalty, -2.0, 2.0)?;
        within(group, "presencePenalty", self.presence_penalty, -2.0, 2.0)?;
        if self.max_tokens.is_some_and(|tokens| tokens < 0) {
            return Err(ApiError::invalid(&format!("{group}.maxTokens"), "必须是大于 0 的整数"));
        }
        if self.system_prompt.as_ref().is_some_and(|text| text.chars().count() > SYSTEM_PROMPT_CHARS_MAX) {
            return Err(ApiError::invalid(
                &format!("{group}.systemPrompt"),
                format!("不能超过 {SYSTEM_PROMPT_CHARS_MAX} 个字符"),
            ));
        }
        Ok(())
    }

    /// These settings with every value that `newer` sets.
    #[must_use]
    pub fn overlaid(&self, newer: &Self) -> Self {
        let newer = newer.clone();
        let old = self.clone();
        Self {
            model: newer.model.or(old.model),
            temperature: newer.temperature.or(old.temperature),
            max_tokens: newer.max_tokens.filter(|tokens| *tokens > 0).or(old.max_tokens),
            top_p: newer.top_p.or(old.top_p),
            frequency_penalty: newer.frequency_penalty.or(old.frequency_penalty),
            presence_penalty: newer.presence_penalty.or(old.presence_penalty),
            system_prompt: newer.system_prompt.or(old.system_prompt),
            stream: None,
        }
    }
}

fn within(group: &str, name: &str, value: Option<f64>, low: f64, high: f64) -> Result<(), ApiError> {
    match value {
        Some(value) if !(low..=high).contains(&value) => {
            Err(ApiError::invalid(&format!("{group}.{name}"), format!("必须在 {low} 到 {high} 之间")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked_by_name() {
        for (json, field) in [
            (r#"{"temperature":2.1}"#, "options.temperature"),
            (r#"{"temperature":-0.1}"#, "options.temperature"),
            (r#"{"topP":1.5}"#, "options.topP"),
            (r#"{"maxTokens":-5}"#, "options.maxTokens"),
            (r#"{"presencePenalty":3}"#, "options.presencePenalty"),
        ] {
            let settings: Settings = serde_json::from_str(json).unwrap();
            assert!(settings.check("options").unwrap_err().details.unwrap().starts_with(field));
        }
        let edges: Settings = serde_json::from_str(r#"{"temperature":2.0,"topP":0,"maxTokens":0}"#).unwrap();
        assert_eq!(edges.check("options"), Ok(()));
    }

    #[test]
    fn newer_values_lie_over_older_ones() {
        let old = Settings { model: Some("a".into()), max_tokens: Some(5), ..Settings::default() };
        let new = Settings { temperature: Some(0.0), max_tokens: Some(0), ..Settings::default() };
        let both = old.overlaid(&new);
        assert_eq!((both.model.as_deref(), both.temperature, both.max_tokens), (Some("a"), Some(0.0), Some(5)));
    }
}
