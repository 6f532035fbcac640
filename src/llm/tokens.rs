//! Estimates of token counts where no provider has counted.
//!
//! Two estimates, for two purposes: [`upper`] is meant not to be too low (holds, context windows), [`typical`] is meant
//! to be close (charges when the provider reports no usage). Integers only. PURE.

use super::PromptMessage;

/// Tokens a chat format adds to each message (role and separators).
const MESSAGE_OVERHEAD: u64 = 4;
/// Tokens a chat format adds once (the start of the answer).
const PROMPT_OVERHEAD: u64 = 3;

/// Counts by what tokenizers treat alike: (ASCII bytes, other characters).
fn count(text: &str) -> (u64, u64) {
    let ascii = text.bytes().filter(u8::is_ascii).count() as u64;
    let other = text.chars().filter(|c| !c.is_ascii()).count() as u64;
    (ascii, other)
}

/// Tokens `text` takes at most with common tokenizers: a third of its ASCII, 1.5 per other character (the platform's own
/// rule for Chinese, contract 2.5).
#[must_use]
pub fn upper(text: &str) -> u64 {
    let (ascii, other) = count(text);
    ascii.div_ceil(3) + (other * 3).div_ceil(2)
}

/// Tokens `text` probably takes: a quarter of its ASCII, one per other character.
#[must_use]
pub fn typical(text: &str) -> u64 {
    let (ascii, other) = count(text);
    ascii.div_ceil(4) + other
}

/// [`upper`] of a whole prompt, format included.
#[must_use]
pub fn upper_prompt(messages: &[PromptMessage]) -> u64 {
    messages.iter().map(|message| upper_message(&message.content)).sum::<u64>() + PROMPT_OVERHEAD
}

/// [`upper`] of one message, format included.
#[must_use]
pub fn upper_message(content: &str) -> u64 {
    upper(content) + MESSAGE_OVERHEAD
}

/// [`typical`] of a whole prompt, format included.
#[must_use]
pub fn typical_prompt(messages: &[PromptMessage]) -> u64 {
    messages.iter().map(|message| typical(&message.content) + MESSAGE_OVERHEAD).sum::<u64>() + PROMPT_OVERHEAD
}

/// Output tokens of `text` that came in `deltas` pieces. Providers send one token a delta, so the pieces count them,
/// unless the text is far too long for that: then the provider joins tokens and the text decides.
#[must_use]
pub fn output(text: &str, deltas: u64) -> u64 {
    let by_text = typical(text);
    if deltas.saturating_mul(2) >= by_text { deltas } else { by_text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_are_ordered_and_scale_with_the_text() {
        for text in ["", "a", "hello world, this is prose", "砚台里的墨", "mixed 中英文 text 🖋️"] {
            assert!(typical(text) <= upper(text), "{text}");
            assert!(upper(text) <= upper(&text.repeat(2)));
        }
        assert_eq!((typical("四个汉字"), upper("四个汉字")), (4, 6));
    }

    #[test]
    fn deltas_count_tokens_unless_they_are_joined() {
        assert_eq!(output(&"字".repeat(40), 40), 40);
        assert_eq!(output(&"字".repeat(60), 40), 40, "1.5 characters a token is usual");
        assert_eq!(output(&"字".repeat(400), 4), 400);
        assert_eq!(output("", 0), 0);
    }
}
