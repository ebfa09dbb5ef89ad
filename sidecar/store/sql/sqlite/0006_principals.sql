-- Who asked for a scope and for an execution, and freezes.

-- Ids or globs; `[]`: any executor may spend the scope.
ALTER TABLE scopes ADD COLUMN executors TEXT NOT NULL DEFAULT '[]';
-- Of the principal that asked for it. If a method established it, `created_by` is its id.
ALTER TABLE scopes ADD COLUMN issuer_kind TEXT NOT NULL DEFAULT 'service';
ALTER TABLE scopes ADD COLUMN issuer_method TEXT NOT NULL DEFAULT 'none';
-- What the request said of its creator, if that is not its principal.
ALTER TABLE scopes ADD COLUMN on_behalf_of TEXT;

-- Of the principal, whose id is in `principal`. Brakes match by kind and groups.
ALTER TABLE executions ADD COLUMN principal_kind TEXT NOT NULL DEFAULT 'service';
ALTER TABLE executions ADD COLUMN principal_method TEXT NOT NULL DEFAULT 'none';
ALTER TABLE executions ADD COLUMN principal_groups TEXT NOT NULL DEFAULT '[]';

CREATE TABLE freezes (
    freeze_id  TEXT PRIMARY KEY,
    tenant_id  TEXT NOT NULL,  -- of the principal that set it; `default` is every tenant
    matching   TEXT NOT NULL,  -- JSON: what it matches, as it was requested
    excepted   TEXT NOT NULL,  -- JSON: what it does not match, alike
    reason     TEXT NOT NULL,
    set_at     INTEGER NOT NULL,
    set_by     TEXT NOT NULL,
    ends_at    INTEGER,        -- null: when it is lifted
    lifted_at  INTEGER,
    lifted_by  TEXT,
    lifted_for TEXT            -- the reason
) STRICT, WITHOUT ROWID;

-- Every admission reads the freezes that are in force.
CREATE INDEX freezes_standing ON freezes (ends_at) WHERE lifted_at IS NULL;
