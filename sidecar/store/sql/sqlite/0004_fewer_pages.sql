-- The index of decisions by scope, without executions and their ends.
-- Scopes have random ids, so that index made each admission and settlement write a page of its own. They are found by
-- the incident of their scope instead.

DROP INDEX decisions_by_scope;

CREATE INDEX decisions_by_scope ON decisions (scope_id)
WHERE scope_id IS NOT NULL AND event NOT IN ('admitted', 'settled');
