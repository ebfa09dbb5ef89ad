-- Freezes: which executions an operator has stopped, until when, and why. The log says the same.

CREATE TABLE freezes (
    freeze_id  TEXT PRIMARY KEY,  -- the decision_id of the record that set it
    tenant_id  TEXT NOT NULL,     -- of the principal that set it; `default` is every tenant
    matching   TEXT NOT NULL,     -- JSON: for each fact that must match, its globs
    excepted   TEXT NOT NULL,     -- JSON: the same of the exception; `{}` if there is none
    reason     TEXT NOT NULL,
    set_at     INTEGER NOT NULL,
    set_by     TEXT NOT NULL,
    ends_at    INTEGER,           -- null: when it is lifted
    lifted_at  INTEGER,
    lifted_by  TEXT,
    lifted_for TEXT,              -- the reason
    lifted_in  TEXT               -- the decision_id of the record that lifted it
) STRICT, WITHOUT ROWID;

-- Every admission is judged by the freezes in force.
CREATE INDEX freezes_standing ON freezes (ends_at) WHERE lifted_at IS NULL;
