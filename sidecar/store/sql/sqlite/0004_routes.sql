-- The label of the route by which an execution came; null: a program asked for it, or it is older than this column.

ALTER TABLE executions ADD COLUMN route TEXT;
