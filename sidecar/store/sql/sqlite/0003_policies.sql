-- Executions without a scope, and the columns that brakes count by.

CREATE TABLE executions_with_facets (
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
        status IN ('in_flight', 'answered', 'not_sent', 'unknown', 'executed', 'not_executed')
    ),
    cost           INTEGER,
    ended_at       INTEGER,
    http_status    INTEGER,
    cause          TEXT,
    principal      TEXT NOT NULL,
    target_agents  TEXT NOT NULL           -- JSON list of strings
) STRICT, WITHOUT ROWID;

-- Who asked, and for which agents, stands in the record of the admission.
INSERT INTO executions_with_facets
SELECT
    e.decision_id, e.scope_id, e.tenant_id, e.incident_id, e.action, e.request_id, e.attempt_number, e.hold,
    e.admitted_at, e.status, e.cost, e.ended_at, e.http_status, e.cause,
    COALESCE(json_extract(CAST(d.envelope AS TEXT), '$.record.decision_inputs.principal'), 'anonymous'),
    CASE json_type(CAST(d.envelope AS TEXT), '$.record.decision_inputs.target_agents')
        WHEN 'array' THEN json_extract(CAST(d.envelope AS TEXT), '$.record.decision_inputs.target_agents')
        ELSE '[]'
    END
FROM executions e
LEFT JOIN decisions d ON d.decision_id = e.decision_id;

DROP TABLE executions;
ALTER TABLE executions_with_facets RENAME TO executions;

CREATE INDEX executions_not_answered ON executions (status, decision_id) WHERE status <> 'answered';

-- One for each way in which a brake may count (core/brakes.py, Tally). None holds what a settlement changes.
CREATE INDEX executions_by_incident ON executions (tenant_id, incident_id, admitted_at);
CREATE INDEX executions_by_action ON executions (action, admitted_at);
CREATE INDEX executions_by_time ON executions (admitted_at);
