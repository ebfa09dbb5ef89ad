-- Decision records of other services, switches, and the indexes of long lists.

-- Where the caller said when it was decided: when it was recorded.
ALTER TABLE decisions ADD COLUMN recorded_at INTEGER;

-- Keys under which a record is kept only once. A key is a digest, so no id stands here in clear.
CREATE TABLE kept_once (
    key         BLOB PRIMARY KEY,
    decision_id TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE switches (
    name       TEXT PRIMARY KEY,
    is_on      INTEGER NOT NULL,
    changed_at INTEGER NOT NULL
) STRICT;

-- The run of a record that was made before there was one. The record itself never changes.
CREATE TABLE run_bindings (
    seq      INTEGER PRIMARY KEY REFERENCES decisions (seq),
    run_id   TEXT NOT NULL,
    bound_at INTEGER NOT NULL
) STRICT;

CREATE INDEX run_bindings_by_run ON run_bindings (run_id);

-- Every index ends in the row's seq, so each serves its filter newest first, without sorting.
CREATE INDEX decisions_by_kind ON decisions (event, decision_type, decision_outcome);
CREATE INDEX decisions_by_tenant_and_kind ON decisions (tenant_id, event, decision_type, decision_outcome);
CREATE INDEX decisions_by_tenant ON decisions (tenant_id);

CREATE TRIGGER kept_once_is_never_changed BEFORE UPDATE ON kept_once
BEGIN
    SELECT RAISE(ABORT, 'keys are append-only');
END;

CREATE TRIGGER kept_once_is_never_deleted BEFORE DELETE ON kept_once
BEGIN
    SELECT RAISE(ABORT, 'keys are append-only');
END;

CREATE TRIGGER run_bindings_are_never_changed BEFORE UPDATE ON run_bindings
BEGIN
    SELECT RAISE(ABORT, 'run bindings are append-only');
END;

CREATE TRIGGER run_bindings_are_never_deleted BEFORE DELETE ON run_bindings
BEGIN
    SELECT RAISE(ABORT, 'run bindings are append-only');
END;

-- The decisions about policies and budgets as the rows that audit tools read: `allowed` or `denied`, and why.
CREATE VIEW policy_decisions AS
SELECT
    decisions.decision_id AS id,
    COALESCE(decisions.run_id, run_bindings.run_id) AS run_id,
    decisions.decision_type AS policy_type,
    CASE WHEN decisions.decision_outcome IN ('selected', 'none') THEN 'allowed' ELSE 'denied' END AS decision,
    json_extract(CAST(decisions.envelope AS TEXT), '$.record.decision_reason') AS rationale,
    0 AS is_synthetic,
    1.0 AS capture_confidence_score,
    json_extract(CAST(decisions.envelope AS TEXT), '$.record.decided_at') AS created_at
FROM decisions
LEFT JOIN run_bindings ON run_bindings.seq = decisions.seq
WHERE decisions.decision_type IN ('policy', 'policy_pre_check', 'budget', 'budget_enforcement');
