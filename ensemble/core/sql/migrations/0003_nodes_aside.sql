-- Nodes that a launcher gives no more tasks.

ALTER TABLE launcher ADD COLUMN aside jsonb NOT NULL DEFAULT '{}';   -- node: why
