-- The ledger's entries, copied from each user's object through its outbox. Append-only; times are unix ms, amounts tokens,
-- costs micro-credits. A movement makes one row per quota type, all with the same request_id and cost_micro.
CREATE TABLE quota_transactions (
  id TEXT PRIMARY KEY,
  user_id TEXT NOT NULL,
  quota_type TEXT NOT NULL,
  period TEXT NOT NULL,
  type TEXT NOT NULL,
  amount INTEGER NOT NULL,
  before_balance INTEGER NOT NULL,
  after_balance INTEGER NOT NULL,
  service TEXT NOT NULL,
  model TEXT NOT NULL,
  request_id TEXT NOT NULL,
  message_id TEXT NOT NULL,
  hold_id TEXT NOT NULL,
  input_tokens INTEGER NOT NULL,
  output_tokens INTEGER NOT NULL,
  reasoning_tokens INTEGER NOT NULL,
  cached_tokens INTEGER NOT NULL,
  estimated INTEGER NOT NULL,
  hostile INTEGER NOT NULL,
  cost_micro INTEGER NOT NULL,
  price_version TEXT NOT NULL,
  written_off INTEGER NOT NULL,
  reason TEXT NOT NULL,
  duration_ms INTEGER NOT NULL,
  at INTEGER NOT NULL
);
CREATE INDEX quota_transactions_by_user ON quota_transactions (user_id, at DESC, id DESC);
CREATE INDEX quota_transactions_by_message ON quota_transactions (user_id, message_id) WHERE message_id <> '';
CREATE INDEX quota_transactions_by_period ON quota_transactions (quota_type, period, user_id);

-- One line per user: the operator's list. Written with every copy of that user's entries.
CREATE TABLE quota_users (
  user_id TEXT PRIMARY KEY,
  role TEXT NOT NULL,
  suspended INTEGER NOT NULL,
  quotas TEXT NOT NULL,
  used_today INTEGER NOT NULL,
  used_month INTEGER NOT NULL,
  used_total INTEGER NOT NULL,
  last_active_at INTEGER NOT NULL,
  updated_at INTEGER NOT NULL
);
CREATE INDEX quota_users_by_activity ON quota_users (last_active_at DESC, user_id);

-- Thresholds crossed, for their users to read. `webhook`: pending, delivered, failed.
CREATE TABLE notifications (
  user_id TEXT NOT NULL,
  id TEXT NOT NULL,
  kind TEXT NOT NULL,
  payload TEXT NOT NULL,
  webhook TEXT NOT NULL DEFAULT 'pending',
  created_at INTEGER NOT NULL,
  read_at INTEGER,
  PRIMARY KEY (user_id, id)
);
CREATE INDEX notifications_by_user ON notifications (user_id, created_at DESC, id);

-- Redemption codes and who used them. A code is good while it is not void, not expired and has uses left; a user uses a code once.
CREATE TABLE quota_codes (
  code TEXT PRIMARY KEY,
  amount INTEGER NOT NULL,
  quota_type TEXT NOT NULL,
  uses INTEGER NOT NULL,
  expires_at INTEGER,
  voided_at INTEGER,
  created_by TEXT NOT NULL,
  created_at INTEGER NOT NULL
);
CREATE INDEX quota_codes_by_time ON quota_codes (created_at DESC, code);
CREATE TABLE quota_redemptions (
  code TEXT NOT NULL,
  user_id TEXT NOT NULL,
  at INTEGER NOT NULL,
  PRIMARY KEY (code, user_id)
);
