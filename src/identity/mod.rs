//! Who is calling: a user id and a role, both taken from a verified token and from nothing else.
//!
//! PURE. Verification of tokens is in [`token`].

pub mod signature;
pub mod token;

use serde::{Deserialize, Serialize};

/// Quota roles, lowest first: the derived order is "the highest wins" (contract 5 row 22).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads; the smallest quota. A token without any known role is a reader.
    #[default]
    Reader,
    /// Writes; `author` in the platform's tokens.
    Writer,
    /// Paying member.
    Vip,
    /// Administrator: unlimited quota, admin routes.
    Admin,
}

impl Role {
    /// The role a claim's word names; unknown words name none.
    #[must_use]
    pub fn from_claim(word: &str) -> Option<Self> {
        match word {
            "reader" => Some(Self::Reader),
            "author" | "writer" => Some(Self::Writer),
            "vip" => Some(Self::Vip),
            "admin" => Some(Self::Admin),
            _ => None,
        }
    }

    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Reader => "reader",
            Self::Writer => "writer",
            Self::Vip => "vip",
            Self::Admin => "admin",
        }
    }
}

/// The verified caller of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The token's `user_id`, or `sub`: 1–128 printable characters.
    pub user_id: String,
    /// The highest role the token names.
    pub role: Role,
    /// When the token was issued, unix seconds (0 if it does not say): the newest token's role counts.
    pub issued_at: i64,
}

/// Whether `id` can be a user's: 1–128 bytes, not blank, no control characters (objects of reserved names have one).
#[must_use]
pub fn is_user_id(id: &str) -> bool {
    !id.trim().is_empty() && id.len() <= 128 && !id.chars().any(char::is_control)
}
