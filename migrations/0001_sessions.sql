-- The index of chat sessions: what lists are read from. The session's own object holds the truth; `rev` only rises, so that
-- a late copy never overwrites a newer one.
CREATE TABLE chat_sessions (
  id TEXT PRIMARY KEY,
  user_id TEXT NOT NULL,
  project_id TEXT,
  title TEXT NOT NULL,
  status TEXT NOT NULL,
  settings TEXT NOT NULL,
  tags TEXT NOT NULL,
  message_count INTEGER NOT NULL,
  token_count INTEGER NOT NULL,
  created_at INTEGER NOT NULL,
  updated_at INTEGER NOT NULL,
  last_message_at INTEGER,
  rev INTEGER NOT NULL
);
CREATE INDEX chat_sessions_by_user ON chat_sessions (user_id, updated_at DESC, id);
CREATE INDEX chat_sessions_by_project ON chat_sessions (user_id, project_id, updated_at DESC);
