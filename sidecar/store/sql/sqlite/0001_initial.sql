-- The tables. Times are microseconds since 1970 (UTC), money is micro-dollars.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;

CREATE TABLE scopes (
    seq             INTEGER PRIMARY KEY,   -- order of issue, for listing newest first
    scope_id        TEXT NOT NULL UNIQUE,
    tenant_id       TEXT NOT NULL,
    incident_id     TEXT NOT NULL,
    allowed_actions TEXT NOT NULL,         -- JSON list of strings
    max_cost        INTEGER NOT NULL,
    max_attempts    INTEGER NOT NULL,
    created_at      INTEGER NOT NULL,
    expires_at      INTEGER NOT NULL,
    intent          TEXT NOT NULL,
    target_agents   TEXT NOT NULL,         -- JSON list of strings
    created_by      TEXT NOT NULL,
    attempts_used   INTEGER NOT NULL CHECK (attempts_used BETWEEN 0 AND max_attempts),
    settled         INTEGER NOT NULL CHECK (settled >= 0),
    held            INTEGER NOT NULL CHECK (held >= 0),
    overrun         INTEGER NOT NULL,
    revoked_at      INTEGER
) STRICT;

CREATE INDEX scopes_by_incident ON scopes (tenant_id, incident_id, seq);

CREATE TABLE executions (
    decision_id    TEXT PRIMARY KEY,       -- of the admission; a UUIDv7, so it sorts by time
    scope_id       TEXT NOT NULL REFERENCES scopes (scope_id),
    tenant_id      TEXT NOT NULL,
    incident_id    TEXT NOT NULL,
    action         TEXT NOT NULL,
    request_id     TEXT NOT NULL,
    attempt_number INTEGER NOT NULL,
    hold           INTEGER NOT NULL,
    admitted_at    INTEGER NOT NULL,
    status         TEXT NOT NULL CHECK (
        status IN ('in_flight', 'answered', 'not_sent', 'unknown', 'executed', 'not_executed')
    ),
    cost           INTEGER,
    ended_at       INTEGER,
    http_status    INTEGER,
    cause          TEXT
) STRICT, WITHOUT ROWID;

-- Nearly every execution ends answered; what somebody may have to look after stays few.
CREATE INDEX executions_not_answered ON executions (status, decision_id) WHERE status <> 'answered';

-- The decision log. `envelope` holds the exact bytes that `hash` covers together with the hash of the
-- record before; the other columns repeat what the bytes say, so that it can be found.
CREATE TABLE decisions (
    seq              INTEGER PRIMARY KEY,  -- from 1, without gaps
    decision_id      TEXT NOT NULL UNIQUE,
    event            TEXT NOT NULL,
    decision_type    TEXT NOT NULL,
    decision_outcome TEXT NOT NULL,
    decided_at       INTEGER NOT NULL,
    tenant_id        TEXT NOT NULL,
    scope_id         TEXT,
    incident_id      TEXT,
    action           TEXT,
    request_id       TEXT,
    run_id           TEXT,
    admission_id     TEXT,
    envelope         BLOB NOT NULL,
    hash             BLOB NOT NULL
) STRICT;

CREATE INDEX decisions_by_scope ON decisions (scope_id) WHERE scope_id IS NOT NULL;
CREATE INDEX decisions_by_incident ON decisions (incident_id) WHERE incident_id IS NOT NULL;
CREATE INDEX decisions_by_request ON decisions (request_id) WHERE request_id IS NOT NULL;
CREATE INDEX decisions_by_run ON decisions (run_id) WHERE run_id IS NOT NULL;

-- Recursive triggers are on, so INSERT OR REPLACE cannot delete a record unseen either.
CREATE TRIGGER decisions_are_never_changed BEFORE UPDATE ON decisions
BEGIN
    SELECT RAISE(ABORT, 'the decision log is append-only');
END;

CREATE TRIGGER decisions_are_never_deleted BEFORE DELETE ON decisions
BEGIN
    SELECT RAISE(ABORT, 'the decision log is append-only');
END;
