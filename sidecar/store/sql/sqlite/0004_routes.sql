-- The route of an execution, and executions that are reported later.

CREATE TABLE executions_by_route (
    decision_id    TEXT PRIMARY KEY,       -- of the admission; a UUIDv7, so it sorts by time
    scope_id       TEXT REFERENCES scopes (scope_id),  -- null: none was needed
    tenant_id      TEXT NOT NULL,
    incident_id    TEXT NOT NULL,
    action         TEXT NOT NULL,
    request_id     TEXT NOT NULL,
    attempt_number INTEGER,
    hold           INTEGER NOT NULL,
    admitted_at    INTEGER NOT NULL,
    status         TEXT NOT NULL CHECK (
        status IN (
            'in_flight', 'running', 'answered', 'not_sent', 'unknown', 'succeeded', 'failed', 'not_executed',
            'executed'
        )
    ),
    cost           INTEGER,
    ended_at       INTEGER,
    http_status    INTEGER,
    cause          TEXT,
    principal      TEXT NOT NULL,
    target_agents  TEXT NOT NULL,          -- JSON list of strings
    route          TEXT,                   -- its label; null: a program asked for it, or it is older than this
    report_token   BLOB,                   -- SHA-256 of its completion token; null: it takes no report
    report_by      INTEGER                 -- from then on no report is taken
) STRICT, WITHOUT ROWID;

INSERT INTO executions_by_route
SELECT
    decision_id, scope_id, tenant_id, incident_id, action, request_id, attempt_number, hold, admitted_at, status,
    cost, ended_at, http_status, cause, principal, target_agents, NULL, NULL, NULL
FROM executions;

DROP TABLE executions;
ALTER TABLE executions_by_route RENAME TO executions;

CREATE INDEX executions_not_answered ON executions (status, decision_id) WHERE status <> 'answered';
-- Those that wait for their report, of which there are few, by their time limit.
CREATE INDEX executions_running ON executions (report_by) WHERE status = 'running';

-- One for each way in which a brake may count (core/brakes.py, Tally). None holds what a settlement changes.
CREATE INDEX executions_by_incident ON executions (tenant_id, incident_id, admitted_at);
CREATE INDEX executions_by_action ON executions (action, admitted_at);
CREATE INDEX executions_by_time ON executions (admitted_at);
