//! Chat: sessions, their message trees, and the turns that grow them.
//!
//! The vocabulary: what a session is, what its object is asked. Decisions are in [`settings`] (validation), [`prompt`]
//! (what fits a window) and [`turn`] (a request becomes a job); rows in [`store`], the D1 list in [`index`], the object in
//! [`object`].

pub mod index;
pub mod object;
pub mod prompt;
pub mod routes;
pub mod settings;
pub mod store;
pub mod turn;
pub mod turns;
pub mod wire;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::generation::Ids;
use crate::generation::event::Mode;
use crate::generation::store::IdempotencyKey;
use crate::identity::Caller;
use crate::quota::{Crossing, Usage};
use settings::Settings;
use turn::ClientMessage;

/// The binding of the session objects.
pub const BINDING: &str = "CHAT_SESSION";

/// The name of a session's object: made from its verified owner, so that another's id names another, empty object.
/// Session ids hold no slash, so no two pairs make one name.
#[must_use]
pub fn object_name(user_id: &str, session_id: &str) -> String {
    format!("{user_id}/{session_id}")
}

/// Whether a session takes messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It does.
    #[default]
    Active,
    /// Kept for reading.
    Archived,
    /// Gone for its user; kept for the books.
    Deleted,
}

impl Status {
    /// The word on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Archived => "archived",
            Self::Deleted => "deleted",
        }
    }
}

/// A session without its messages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// Its id.
    pub id: String,
    /// Its owner.
    pub user_id: String,
    /// The platform's project it belongs to.
    pub project_id: Option<String>,
    /// Shown in lists.
    pub title: String,
    /// The title was set by its user; the first message no longer changes it.
    pub title_set: bool,
    /// Whether it takes messages.
    pub status: Status,
    /// What its user set.
    pub settings: Settings,
    /// Its user's tags.
    pub tags: Vec<String>,
    /// Messages on the active path.
    pub message_count: u64,
    /// Tokens used by all its generations.
    pub token_count: u64,
    /// Unix ms.
    pub created_at: i64,
    /// Unix ms.
    pub updated_at: i64,
    /// Unix ms.
    pub last_message_at: Option<i64>,
    /// Rises with every change: a late copy in D1 never overwrites a newer one.
    pub rev: u64,
}

/// Title of a session that has none yet.
pub const UNTITLED: &str = "新对话";

impl Session {
    /// A new, empty session.
    #[must_use]
    pub fn new(id: &str, user_id: &str, project_id: Option<String>, now_ms: i64) -> Self {
        Self {
            id: id.to_owned(),
            user_id: user_id.to_owned(),
            project_id,
            title: UNTITLED.to_owned(),
            title_set: false,
            status: Status::Active,
            settings: Settings::default(),
            tags: Vec::new(),
            message_count: 0,
            token_count: 0,
            created_at: now_ms,
            updated_at: now_ms,
            last_message_at: None,
            rev: 1,
        }
    }
}

/// What a turn does to the tree.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum TurnKind {
    /// A new message at the end of the active path.
    Ask {
        /// What the author says.
        content: String,
        /// Turns the client holds, used where the session has none.
        history: Vec<ClientMessage>,
        /// For a session made by this turn.
        project_id: Option<String>,
        /// The session may be new.
        create: bool,
    },
    /// Another wording of an earlier question: a sibling of it, answered anew.
    Edit {
        /// The question.
        message_id: String,
        /// Its new wording.
        content: String,
    },
    /// Another answer to the same question: a sibling of the answer.
    Again {
        /// The answer (or its question).
        message_id: String,
    },
}

/// How the caller wants the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Delivery {
    /// As events.
    Stream(Mode),
    /// Whole, by this instant (unix ms) with what there is.
    Whole {
        /// Unix ms.
        until: i64,
    },
}

/// A turn as the object gets it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Turn {
    /// What it does.
    pub kind: TurnKind,
    /// For this turn alone.
    pub options: Settings,
    /// A repeated request finds the first one's generation by it.
    pub key: Option<IdempotencyKey>,
    /// How to answer.
    pub delivery: Delivery,
}

/// Changes to a session by its user; absent is unchanged.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Patch {
    /// New title.
    pub title: Option<String>,
    /// New status, not `deleted`.
    pub status: Option<Status>,
    /// New tags.
    pub tags: Option<Vec<String>>,
    /// Settings to set.
    pub settings: Settings,
}

/// What a session object is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Command {
    /// A turn.
    Turn(Box<Turn>),
    /// Go on reading a generation.
    Resume {
        /// Whose generation; the newest if absent.
        message_id: Option<String>,
        /// Events up to this id are known.
        after: u64,
        /// How.
        mode: Mode,
    },
    /// Stop the running generation.
    Stop,
    /// Make an empty session.
    Create {
        /// Its project.
        project_id: Option<String>,
        /// Title and settings.
        patch: Patch,
    },
    /// The session and a page of its active path.
    Read {
        /// Messages at most.
        limit: u64,
        /// Messages to pass over.
        offset: u64,
    },
    /// Change it.
    Update(Patch),
    /// Delete it (softly).
    Delete,
    /// Clear its history (softly).
    Clear,
    /// Make the path through this message the active one.
    SetPath {
        /// The message.
        message_id: String,
    },
    /// What a turn would hold at most, without starting it.
    Quote {
        /// The turn.
        kind: TurnKind,
        /// Its options.
        options: Settings,
    },
    /// From the user's ledger: thresholds were crossed, tell the running stream.
    QuotaEvent {
        /// Which.
        crossings: Vec<Crossing>,
    },
}

/// What the session's own ledger sends it: the one call that comes from no user.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Incoming {
    /// A user's call.
    Call(Call),
    /// A ledger's word.
    Word(Command),
}

/// A command with who gives it and to which session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// The verified caller: the session's owner, since the object's name is derived from them.
    pub caller: Caller,
    /// The session.
    pub session_id: String,
    /// What to do.
    pub command: Command,
}

/// A whole answer, as the object gives it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WholeAnswer {
    /// Its ids.
    pub ids: Ids,
    /// The text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: String,
    /// The model that wrote it.
    pub model: String,
    /// The prompt held more than the question.
    pub context_used: bool,
    /// What was used.
    pub usage: Usage,
}

/// A session and a page of its active path, ready for the wire.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// The session object.
    pub session: Value,
    /// Message objects, oldest first.
    pub messages: Vec<Value>,
    /// Messages on the active path.
    pub total: u64,
    /// As asked.
    pub limit: u64,
    /// As asked.
    pub offset: u64,
}
