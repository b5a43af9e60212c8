-- Batch jobs and the service that submits them.

ALTER TABLE batch_job
  ADD COLUMN name        text UNIQUE,        -- what the scheduler calls it
  ADD COLUMN policy      text,               -- [queue.NAME] it was submitted for; null: by hand
  ADD COLUMN why         text NOT NULL DEFAULT '',
  ADD COLUMN exit_code   int,
  ADD COLUMN error       text,               -- the last lines of its output, where nobody else explains
  ADD COLUMN record      jsonb,              -- what its launcher wrote when it left
  ADD COLUMN missing     int NOT NULL DEFAULT 0,  -- looks in a row that did not show it
  ADD COLUMN first_missing_at timestamptz,
  ADD COLUMN ends_at     timestamptz;
CREATE INDEX batch_job_active_idx ON batch_job (id)
  WHERE state IN ('NEW', 'SUBMITTED', 'QUEUED', 'RUNNING');
-- Schedulers count from one again now and then: an id is unique only as long as its job is.
ALTER TABLE batch_job DROP CONSTRAINT batch_job_scheduler_cluster_scheduler_id_key;
CREATE INDEX launcher_batch_job_idx ON launcher (batch_job_id) WHERE batch_job_id IS NOT NULL;
CREATE INDEX lease_active_idx ON lease (launcher_id) WHERE state = 'ACTIVE';

-- The service of this site: one row. Who takes it over raises the epoch, and with it fences off the one before.
CREATE TABLE service (
  is_only      boolean PRIMARY KEY DEFAULT true CHECK (is_only),
  token        text NOT NULL DEFAULT substr(md5(gen_random_uuid()::text), 1, 6),  -- tells this site's batch jobs from others'
  epoch        bigint NOT NULL DEFAULT 0,
  host         text,
  pid          int,
  period_s     double precision,
  started_at   timestamptz,
  seen_at      timestamptz,
  stopped_at   timestamptz
);
INSERT INTO service DEFAULT VALUES;

-- What keeps a queue policy from submitting, besides its limits.
CREATE TABLE queue_state (
  name        text PRIMARY KEY,
  paused_by   text CHECK (paused_by IN ('user', 'service')),
  paused_at   timestamptz,
  reason      text,
  failures    int NOT NULL DEFAULT 0,        -- of the same kind, in a row
  kind        text,
  retry_at    timestamptz,
  CHECK ((paused_by IS NULL) = (paused_at IS NULL))
);

-- Every decision to submit or not, when it changes.
CREATE TABLE decision (
  id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at            timestamptz NOT NULL DEFAULT clock_timestamp(),
  policy        text NOT NULL,
  reason        text NOT NULL,
  batch_job_id  bigint REFERENCES batch_job ON DELETE SET NULL
);
CREATE INDEX decision_policy_idx ON decision (policy, id DESC);

-- Replaced by one that knows the batch job.
DROP FUNCTION IF EXISTS register_launcher(
  jsonb, text, text, text, text[], text, text, int, interval, interval, int, int, interval);
