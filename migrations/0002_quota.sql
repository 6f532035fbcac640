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
  at INTEGER NOT NULL
);
CREATE INDEX quota_transactions_by_user ON quota_transactions (user_id, at DESC, id DESC);
