//! Sessions and messages as the wire has them: the specification's keys with both clients' aliases (contract 2.2, 5 rows
//! 3–8). PURE.

use serde_json::{Map, Value, json};

use super::Session;
use super::settings::{MAX_TOKENS_DEFAULT, TEMPERATURE_DEFAULT};
use super::store::Message;
use crate::config::Config;
use crate::quota::period::Zone;

/// A session object without messages.
#[must_use]
pub fn session(session: &Session, config: &Config) -> Value {
    let zone = config.zone;
    let last = session.last_message_at.map(|at| zone.rfc3339(at));
    json!({
        "id": session.id,
        "userId": session.user_id,
        "projectId": session.project_id,
        "title": session.title,
        "status": session.status,
        "settings": settings(session, config),
        "metadata": {
            "messageCount": session.message_count,
            "tokenCount": session.token_count,
            "tags": session.tags,
            "lastActivityAt": zone.rfc3339(session.last_message_at.unwrap_or(session.updated_at)),
        },
        "tags": session.tags,
        "messageCount": session.message_count,
        "lastMessageAt": last,
        "createdAt": zone.rfc3339(session.created_at),
        "updatedAt": zone.rfc3339(session.updated_at),
    })
}

/// The settings in effect: what the user set over the defaults.
fn settings(session: &Session, config: &Config) -> Value {
    let mut fields = match serde_json::to_value(&session.settings) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    fields.entry("model").or_insert_with(|| config.default_model.clone().into());
    fields.entry("temperature").or_insert_with(|| TEMPERATURE_DEFAULT.into());
    fields.entry("maxTokens").or_insert_with(|| MAX_TOKENS_DEFAULT.into());
    Value::Object(fields)
}

/// A message, with the ids of its siblings where it has any.
#[must_use]
pub fn message(message: &Message, siblings: &[(String, String, String)], zone: Zone) -> Value {
    let created = zone.rfc3339(message.created_at);
    let mut value = json!({
        "id": message.id,
        "parentId": Some(&message.parent_id).filter(|id| !id.is_empty()),
        "role": message.role,
        "content": message.content,
        "tokenUsed": message.token_used,
        "status": message.status,
        "createdAt": created,
        "timestamp": created,
    });
    let same: Vec<&str> = siblings
        .iter()
        .filter(|(parent, role, _)| *parent == message.parent_id && *role == message.role)
        .map(|(_, _, id)| id.as_str())
        .collect();
    if let Some(fields) = value.as_object_mut() {
        if let Some(reason) = &message.finish_reason {
            fields.insert("finishReason".to_owned(), reason.as_str().into());
        }
        if let Some(model) = &message.model {
            fields.insert("model".to_owned(), model.as_str().into());
        }
        if same.len() > 1 {
            fields.insert("siblingIds".to_owned(), json!(same));
        }
    }
    value
}
