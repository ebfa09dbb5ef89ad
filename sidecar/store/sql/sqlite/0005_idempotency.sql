-- Idempotency keys: which execution holds a key, and the answer that repeats of its request get.

CREATE TABLE idempotency_keys (
    key          BLOB PRIMARY KEY,     -- SHA-256 of the key with its principal, tenant and route
    request      BLOB NOT NULL,        -- SHA-256 of method, target and body
    admission_id TEXT NOT NULL,        -- the execution that holds the key
    kept_for     INTEGER NOT NULL,     -- microseconds after the end of that execution
    expires_at   INTEGER NOT NULL,     -- before this time the key is not forgotten
    answered_at  INTEGER,              -- null, as the columns below are: no answer is kept
    counters     TEXT,                 -- JSON list: those of the scope at that time; null: there was no scope
    status       INTEGER,
    reason       TEXT,
    headers      TEXT,                 -- JSON list of pairs, each byte a character
    body         BLOB                  -- null: only the status is kept
) STRICT;

CREATE INDEX idempotency_keys_by_expiry ON idempotency_keys (expires_at);
