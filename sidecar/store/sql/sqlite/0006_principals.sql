-- Who asked for a scope and for an execution.

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
