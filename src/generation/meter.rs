//! The charging policy: what a generation is charged, by how it ended and what the provider reported.
//!
//! - Nothing delivered (no text): nothing charged, whatever was reported.
//! - Text delivered and a believable usage reported: that usage.
//! - Text delivered and none (or an unbelievable one): an estimate, flagged; a lie is flagged besides.
//!
//! How it ended does not change the price of what was delivered. The ledger charges no more output than it granted, and no
//! more in all than the balance holds. PURE.

use crate::llm::answer::Answer;
use crate::llm::tokens;
use crate::quota::Usage;

/// Usage this far over the model's window is still put down to different counting, tokens.
const WINDOW_SLACK: u64 = 1_024;

/// What `answer` is charged; `None` when nothing was delivered.
#[must_use]
pub fn usage(answer: &Answer, prompt_typical: u64, context_window: u64) -> Option<Usage> {
    if answer.text.is_empty() {
        return None;
    }
    let believable = answer.usage.filter(|usage| {
        let total = usage.input.saturating_add(usage.output);
        usage.output > 0 && total <= context_window.saturating_add(WINDOW_SLACK)
    });
    let hostile = answer.hostile || (answer.usage.is_some() && believable.is_none());
    Some(match believable.filter(|_| !answer.hostile) {
        Some(reported) => Usage {
            input: reported.input,
            output: reported.output,
            reasoning: reported.reasoning,
            cached: reported.cached,
            estimated: false,
            hostile: false,
        },
        None => estimate(&answer.text, &answer.reasoning, answer.deltas, prompt_typical, hostile),
    })
}

/// The estimate for `text` and `reasoning` that came in `deltas` pieces.
#[must_use]
pub fn estimate(text: &str, reasoning: &str, deltas: u64, prompt_typical: u64, hostile: bool) -> Usage {
    let reasoning_tokens = tokens::typical(reasoning);
    let output = if reasoning.is_empty() {
        tokens::output(text, deltas)
    } else {
        let both = tokens::typical(text).saturating_add(reasoning_tokens);
        if deltas.saturating_mul(2) >= both { deltas } else { both }
    };
    Usage {
        input: prompt_typical,
        output: output.max(1),
        reasoning: reasoning_tokens.min(output),
        cached: 0,
        estimated: true,
        hostile,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llm::answer::Reported;

    fn answer(text: &str, usage: Option<(u64, u64)>, hostile: bool) -> Answer {
        let mut answer = Answer::of_tokens(1_000);
        answer.text = text.to_owned();
        answer.deltas = text.chars().count() as u64;
        answer.usage = usage.map(|(input, output)| Reported { input, output, reasoning: 0, cached: 0 });
        answer.hostile = hostile;
        answer
    }

    #[test]
    fn the_policy() {
        // (text, reported, hostile) → (input, output, estimated, hostile)
        type Case<'a> = (&'a str, Option<(u64, u64)>, bool, Option<(u64, u64, bool, bool)>);
        let cases: [Case<'_>; 8] = [
            ("", None, false, None),
            ("", Some((50, 0)), false, None),
            ("四个汉字", Some((50, 4)), false, Some((50, 4, false, false))),
            ("四个汉字", None, false, Some((30, 4, true, false))),
            ("四个汉字", None, true, Some((30, 4, true, true))),
            ("四个汉字", Some((50, 4)), true, Some((30, 4, true, true))),
            ("四个汉字", Some((50, 1 << 40)), false, Some((30, 4, true, true))),
            ("四个汉字", Some((0, 0)), false, Some((30, 4, true, true))),
        ];
        for (text, reported, hostile, charged) in cases {
            let usage = usage(&answer(text, reported, hostile), 30, 8_192);
            assert_eq!(usage.map(|u| (u.input, u.output, u.estimated, u.hostile)), charged, "{text} {reported:?} {hostile}");
        }
    }

    #[test]
    fn reasoning_is_counted_as_output() {
        let usage = estimate("四个汉字", "先想一想", 8, 10, false);
        assert_eq!((usage.output, usage.reasoning), (8, 4));
    }
}
