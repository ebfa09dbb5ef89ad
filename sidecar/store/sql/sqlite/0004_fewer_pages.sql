-- Scopes have random ids, so an index by scope makes each admission and settlement write a page of its own. They
-- are found by the incident of their scope instead. This index is for the other records of a scope.

DROP INDEX decisions_by_scope;

CREATE INDEX decisions_by_scope ON decisions (scope_id)
WHERE scope_id IS NOT NULL AND event NOT IN ('admitted', 'settled');
