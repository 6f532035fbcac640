//! What a generation costs, in integers.
//!
//! 1 credit = 1,000,000 micro-credits. Prices are decimals of credits per 1,000 tokens with at most 6 places, so they
//! are whole micro-credits per 1,000 tokens. Invariant: cost = ceil((in·price_in + out·price_out) / 1,000), rounded once.
//!
//! PURE.

use serde::{Deserialize, Serialize};

/// Micro-credits per 1,000 tokens, for what goes in and what comes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Price {
    /// Micro-credits per 1,000 prompt tokens.
    pub input_micro: u64,
    /// Micro-credits per 1,000 completion tokens.
    pub output_micro: u64,
}

impl Price {
    /// Cost in micro-credits, rounded up once; saturates far above any sum of money (2^53 − 1).
    #[must_use]
    pub fn cost_micro(self, input_tokens: u64, output_tokens: u64) -> u64 {
        let thousandths =
            u128::from(input_tokens) * u128::from(self.input_micro) + u128::from(output_tokens) * u128::from(self.output_micro);
        u64::try_from(thousandths.div_ceil(1_000)).unwrap_or(u64::MAX).min(super::SAFE_INTEGER_MAX)
    }

    /// Names this price in an entry, so that a later price change is seen to be one: `in/out` in micro-credits.
    #[must_use]
    pub fn version(self) -> String {
        format!("{}/{}", self.input_micro, self.output_micro)
    }
}

/// Parses credits per 1,000 tokens, as written in the catalogue, into micro-credits: `"1.5"` is 1,500,000.
/// Exponents, signs and more than 6 decimal places are refused: a price that cannot be exact is no price.
///
/// # Errors
/// An English sentence for the operator.
pub fn parse_micro(text: &str) -> Result<u64, String> {
    let wrong = || format!("price {text:?} must be a decimal ≥ 0 with at most 6 places");
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 6 {
        return Err(wrong());
    }
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let fraction: u64 = format!("{fraction:0<6}").parse().map_err(|_| wrong())?;
    whole
        .checked_mul(1_000_000)
        .and_then(|micro| micro.checked_add(fraction))
        .filter(|micro| *micro <= super::SAFE_INTEGER_MAX)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_parse_exactly_or_not_at_all() {
        for (text, micro) in [("30", 30_000_000), ("1.5", 1_500_000), ("0.000001", 1), ("0", 0), ("2.10", 2_100_000)] {
            assert_eq!(parse_micro(text), Ok(micro), "{text}");
        }
        for text in ["", "-1", "1e3", "0.0000001", ".5", "1.", "NaN", "99999999999999999999", "9007199255"] {
            assert!(parse_micro(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cost_is_rounded_up_once() {
        let gpt4 = Price { input_micro: 30_000_000, output_micro: 60_000_000 };
        assert_eq!(gpt4.cost_micro(1, 0), 30_000);
        assert_eq!(gpt4.cost_micro(1_000, 500), 60_000_000);
        let odd = Price { input_micro: 1, output_micro: 1 };
        // Two halves rounded apart would make 2: the sum is rounded once.
        assert_eq!(odd.cost_micro(500, 500), 1);
        assert_eq!(odd.cost_micro(0, 0), 0);
        assert_eq!(gpt4.cost_micro(u64::MAX, u64::MAX), super::super::SAFE_INTEGER_MAX);
    }
}
