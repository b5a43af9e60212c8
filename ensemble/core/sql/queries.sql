-- Every statement that is not a function: `-- name(parameters)` opens one, a line of why follows.
-- State literals are written out: a generic plan cannot use a partial index for `state = $1`.

-- schema_found()
-- Which schema this database has, and which functions.
SELECT (SELECT max(version) FROM schema_version),
       (SELECT sha256 FROM schema_script WHERE name = 'functions.sql')

-- ================================================================ apps and workflows

-- insert_app(name, command, description, environ, env_script, output)
-- Nothing comes back when the name is taken.
INSERT INTO app (name, command, description, environ, env_script, output)
VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (name) DO NOTHING
RETURNING id, name, command, description, environ, env_script, output, created_at

-- replace_app(name, command, description, environ, env_script, output)
-- Tasks that were added before keep the command they were added with.
UPDATE app
   SET command = $2, description = $3, environ = $4, env_script = $5, output = $6
 WHERE name = $1
RETURNING id, name, command, description, environ, env_script, output, created_at

-- select_apps(names)
-- All of them when names is null.
SELECT id, name, command, description, environ, env_script, output, created_at
  FROM app
 WHERE $1::text[] IS NULL OR name = ANY ($1)
 ORDER BY name

-- delete_app(name)
-- Tasks keep their own command; only those that have not ended stand in the way.
DELETE FROM app a
 WHERE a.name = $1
   AND NOT EXISTS (
     SELECT 1 FROM task t
      WHERE t.app_id = a.id AND t.state NOT IN ('JOB_FINISHED', 'FAILED', 'USER_KILLED'))
RETURNING a.id

-- insert_workflows(names)
-- Never an update: that would lock a workflow's row against everybody who adds to it.
INSERT INTO workflow (name)
SELECT n FROM unnest($1::text[]) AS n
 WHERE NOT EXISTS (SELECT 1 FROM workflow w WHERE w.name = n)
 ORDER BY n
ON CONFLICT (name) DO NOTHING

-- named_workflows(names)
SELECT id, name FROM workflow WHERE name = ANY ($1::text[])

-- workflow_ids(substring)
-- strpos, not LIKE: the filter is text, not a pattern.
SELECT id FROM workflow WHERE strpos(name, $1) > 0 ORDER BY id

-- select_workflows()
SELECT w.name, t.state, count(*) AS tasks
  FROM task t JOIN workflow w ON w.id = t.workflow_id
 GROUP BY w.name, t.state
 ORDER BY w.name, t.state

-- most_gpus()
-- Of one node, as far as launchers of late have told.
SELECT max(node_gpus) FROM launcher
 WHERE coalesce(ended_at, now()) > now() - interval '30 days'

-- ================================================================ adding

-- insert_shapes(packings, threads, threads_per_core, gpus, memory)
-- Like a workflow's name: before the transaction that adds tasks, and never an update.
INSERT INTO shape (node_packing_count, threads_per_rank, threads_per_core, gpus_per_rank, memory_mb)
SELECT n.packing, n.threads, n.per_core, n.gpus, n.mb
  FROM unnest($1::int[], $2::int[], $3::int[], $4::int[], $5::int[])
       AS n (packing, threads, per_core, gpus, mb)
 WHERE NOT EXISTS (
   SELECT 1 FROM shape s
    WHERE s.node_packing_count = n.packing AND s.gpus_per_rank = n.gpus
      AND coalesce(s.threads_per_rank, 0) = coalesce(n.threads, 0)
      AND coalesce(s.threads_per_core, 0) = coalesce(n.per_core, 0)
      AND coalesce(s.memory_mb, 0) = coalesce(n.mb, 0))
 ORDER BY 1, 2, 3, 4, 5
ON CONFLICT DO NOTHING

-- select_shapes(packings, threads, threads_per_core, gpus, memory)
SELECT s.id, s.node_packing_count, s.threads_per_rank, s.threads_per_core, s.gpus_per_rank, s.memory_mb
  FROM unnest($1::int[], $2::int[], $3::int[], $4::int[], $5::int[])
       AS n (packing, threads, per_core, gpus, mb)
  JOIN shape s ON s.node_packing_count = n.packing AND s.gpus_per_rank = n.gpus
   AND coalesce(s.threads_per_rank, 0) = coalesce(n.threads, 0)
   AND coalesce(s.threads_per_core, 0) = coalesce(n.per_core, 0)
   AND coalesce(s.memory_mb, 0) = coalesce(n.mb, 0)

-- next_task_ids(count)
-- COPY returns nothing, so the ids are drawn first.
SELECT nextval('task_id_seq') FROM generate_series(1, $1)

-- lock_parents(ids)
-- FOR SHARE waits for a parent's end that is being written, and holds one that is about to.
SELECT id, state FROM task WHERE id = ANY ($1::bigint[]) ORDER BY id FOR SHARE

-- end_at_birth(ids)
-- COPY has no clock of the server's.
UPDATE task SET ended_at = clock_timestamp() WHERE id = ANY ($1::bigint[])

-- insert_submission(key, ids)
INSERT INTO submission (key, task_ids) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING RETURNING key

-- select_submission(key)
SELECT task_ids FROM submission WHERE key = $1

-- ================================================================ looking

-- select_tasks(ids, workflow, states, name, app, tags, limit, after)
-- The one selector: whatever is null does not restrict.
SELECT t.id, s.name, w.name AS workflow, a.name AS app, t.state, s.argv, s.workdir, t.num_nodes,
       t.ranks_per_node, n.node_packing_count, t.wall_time_minutes, s.time_limit_minutes, t.priority,
       t.attempt, t.failures, t.timeouts, t.losses, t.pending_parents, t.lease_id, t.exit_code,
       t.cause, t.reason, l.error, coalesce(l.nodes, '{}') AS nodes, t.created_at, t.started_at,
       t.ended_at, s.output, s.tags
  FROM task t
  JOIN task_spec s ON s.task_id = t.id
  JOIN shape n ON n.id = t.shape_id
  JOIN workflow w ON w.id = t.workflow_id
  LEFT JOIN app a ON a.id = t.app_id
  LEFT JOIN attempt l ON l.task_id = t.id AND l.attempt = t.attempt
 WHERE ($1::bigint[] IS NULL OR t.id = ANY ($1))
   AND ($2::text IS NULL OR strpos(w.name, $2) > 0)
   AND ($3::text[] IS NULL OR t.state = ANY ($3))
   AND ($4::text IS NULL OR strpos(s.name, $4) > 0)
   AND ($5::text IS NULL OR a.name = $5)
   AND ($6::jsonb IS NULL OR s.tags @> $6)
   AND t.id > $8
 ORDER BY t.id
 LIMIT $7

-- select_task_ids(ids, workflow, states, name, app, tags)
-- The wide table is read only where something of it is asked for.
SELECT t.id, t.state
  FROM task t
  LEFT JOIN (SELECT s.task_id, s.name, s.tags FROM task_spec s
              WHERE $4::text IS NOT NULL OR $6::jsonb IS NOT NULL) s ON s.task_id = t.id
  JOIN workflow w ON w.id = t.workflow_id
  LEFT JOIN app a ON a.id = t.app_id
 WHERE ($1::bigint[] IS NULL OR t.id = ANY ($1))
   AND ($2::text IS NULL OR strpos(w.name, $2) > 0)
   AND ($3::text[] IS NULL OR t.state = ANY ($3))
   AND ($4::text IS NULL OR strpos(s.name, $4) > 0)
   AND ($5::text IS NULL OR a.name = $5)
   AND ($6::jsonb IS NULL OR s.tags @> $6)
 ORDER BY t.id

-- count_states(workflow)
SELECT t.state, count(*) AS tasks, count(t.lease_id) AS held
  FROM task t
 WHERE $1::text IS NULL
    OR t.workflow_id IN (SELECT w.id FROM workflow w WHERE strpos(w.name, $1) > 0)
 GROUP BY t.state

-- count_unfinished(ids)
-- What `wait` waits for: not final, or final while its process still dies.
SELECT count(*) FROM task
 WHERE id = ANY ($1::bigint[])
   AND (state NOT IN ('JOB_FINISHED', 'FAILED', 'USER_KILLED') OR lease_id IS NOT NULL)

-- select_spec(id)
SELECT s.params, s.environ, s.env_script, n.threads_per_rank, n.threads_per_core, n.gpus_per_rank,
       n.memory_mb, s.mpi_flags, s.cpu_affinity, s.wait_for_parents, s.data
  FROM task_spec s
  JOIN task t ON t.id = s.task_id
  JOIN shape n ON n.id = t.shape_id
 WHERE s.task_id = $1

-- select_attempts(id)
SELECT task_id, attempt, lease_id, nodes, claimed_at, started_at, ended_at, exit_code, outcome,
       cause, reason, error, output
  FROM attempt WHERE task_id = $1 ORDER BY attempt

-- select_events(id)
SELECT id, task_id, at, from_state, to_state, attempt, lease_id, actor, reason
  FROM event WHERE task_id = $1 ORDER BY id

-- select_parents(id)
SELECT parent_id FROM task_parent WHERE child_id = $1 ORDER BY parent_id

-- select_children(id)
SELECT child_id FROM task_parent WHERE parent_id = $1 ORDER BY child_id

-- event_horizon()
-- Events at or after this transaction may still be joined by others that began before them.
SELECT pg_snapshot_xmin(pg_current_snapshot())::text

-- select_new_events(xid, id, ids, workflow, limit)
-- In the order (transaction, id) and below the oldest open transaction, so no late commit is missed.
SELECT e.id, e.task_id, e.at, e.from_state, e.to_state, e.attempt, e.lease_id, e.actor, e.reason,
       e.xid::text AS xid
  FROM event e
 WHERE (e.xid, e.id) > ($1::text::xid8, $2::bigint)
   AND e.xid < pg_snapshot_xmin(pg_current_snapshot())
   AND ($3::bigint[] IS NULL OR e.task_id = ANY ($3))
   AND ($4::text IS NULL OR strpos(
         (SELECT w.name FROM task t JOIN workflow w ON w.id = t.workflow_id
           WHERE t.id = e.task_id), $4) > 0)
 ORDER BY e.xid, e.id
 LIMIT $5

-- select_launchers(only_live)
SELECT r.id, l.id AS lease_id, r.host, r.pid, r.job_mode, r.wf_filter, r.nodes, r.aside, r.scheduler,
       r.scheduler_job_id, l.state AS lease_state, r.started_at, r.ended_at,
       l.renewed_at AS last_seen_at,
       (SELECT count(*) FROM task t WHERE t.lease_id = l.id) AS tasks
  FROM launcher r JOIN lease l ON l.launcher_id = r.id
 WHERE NOT $1 OR l.state = 'ACTIVE'
 ORDER BY r.id DESC
 LIMIT 200

-- ================================================================ changing

-- modify_task(id, workflow_id, priority, wall_time_minutes, num_nodes, ranks_per_node, max_retries)
-- Only what no launcher holds; null leaves a field as it is.
UPDATE task
   SET workflow_id = coalesce($2, workflow_id), priority = coalesce($3, priority),
       wall_time_minutes = coalesce($4, wall_time_minutes), num_nodes = coalesce($5, num_nodes),
       ranks_per_node = coalesce($6, ranks_per_node), max_retries = coalesce($7, max_retries)
 WHERE id = $1 AND lease_id IS NULL
RETURNING id

-- modify_spec(id, time_limit_minutes, tags, data)
UPDATE task_spec
   SET time_limit_minutes = coalesce($2, time_limit_minutes), tags = tags || $3, data = data || $4
 WHERE task_id = $1

-- ring()
-- After a commit, never in one: watchers read the new events, launchers with free nodes claim.
SELECT pg_notify('ensemble_event', ''), pg_notify('ensemble_work', '')

-- ================================================================ under a lease

-- renew_lease(lease)
-- Nothing comes back when the lease is lost. Late is allowed while nobody has closed it.
UPDATE lease
   SET expires_at = clock_timestamp() + ttl, renewed_at = clock_timestamp()
 WHERE id = $1 AND state = 'ACTIVE'
RETURNING pg_postmaster_start_time() AS server_started_at

-- set_resources(launcher, cores, gpus)
UPDATE launcher SET node_cores = $2, node_gpus = $3 WHERE id = $1

-- set_aside(launcher, nodes)
-- All that get no more tasks, each with its reason.
UPDATE launcher SET aside = $2 WHERE id = $1

-- select_held(lease)
-- What the store says this lease holds; compared with what the launcher knows.
SELECT id, attempt, state FROM task WHERE lease_id = $1

-- select_doomed(lease)
-- Held, but somebody moved it away from running: the kill set.
SELECT id, attempt FROM task
 WHERE lease_id = $1 AND state NOT IN ('RUNNING', 'PREPROCESSED', 'RESTART_READY')

-- has_prospect(workflows, nodes, is_serial)
-- Whether waiting tasks that would fit depend on what runs under a live lease.
WITH RECURSIVE busy AS (
  SELECT t.id FROM task t JOIN lease l ON l.id = t.lease_id AND l.state = 'ACTIVE'
), down (id) AS (
  SELECT e.child_id FROM busy b JOIN task_parent e ON e.parent_id = b.id AND e.waits
    JOIN task c ON c.id = e.child_id AND c.state = 'AWAITING_PARENTS'
  UNION
  SELECT e.child_id FROM down d JOIN task_parent e ON e.parent_id = d.id AND e.waits
    JOIN task c ON c.id = e.child_id AND c.state = 'AWAITING_PARENTS'
)
SELECT EXISTS (
  SELECT 1 FROM down d JOIN task t ON t.id = d.id
   WHERE t.num_nodes <= $2 AND (NOT $3 OR (t.num_nodes = 1 AND t.ranks_per_node = 1))
     AND ($1::int[] IS NULL OR t.workflow_id = ANY ($1)))

-- ================================================================ batch jobs

-- set_script(id, script, output)
UPDATE batch_job SET script = $2, spec = spec || jsonb_build_object('output', $3::text) WHERE id = $1

-- set_submitted(id, scheduler_id)
-- A launcher or a look may have been quicker, and has moved the row on; the scheduler's own spelling of the
-- id is the one that its commands take.
UPDATE batch_job
   SET scheduler_id = CASE WHEN job_number(scheduler_id) <> job_number($2) THEN scheduler_id ELSE $2 END,
       submitted_at = coalesce(submitted_at, clock_timestamp()),
       state = CASE WHEN state = 'NEW' THEN 'SUBMITTED' ELSE state END,
       reason = CASE WHEN state = 'NEW' THEN NULL ELSE reason END
 WHERE id = $1
RETURNING id

-- set_rejected(id, reason)
UPDATE batch_job SET state = 'REJECTED', reason = $2, ended_at = clock_timestamp()
 WHERE id = $1 AND state = 'NEW'
RETURNING id

-- set_doubtful(id, reason)
-- It stays NEW: whether the scheduler has it is found out by its name.
UPDATE batch_job SET reason = $2 WHERE id = $1 AND state = 'NEW'

-- set_cancelled(id, reason)
-- Asked for; it ends when the scheduler says so.
UPDATE batch_job SET spec = spec || jsonb_build_object('cancelled', $2::text)
 WHERE id = $1 AND state IN ('NEW', 'SUBMITTED', 'QUEUED', 'RUNNING')
RETURNING id

-- set_missing(id)
UPDATE batch_job
   SET missing = missing + 1, first_missing_at = coalesce(first_missing_at, clock_timestamp())
 WHERE id = $1 AND state IN ('NEW', 'SUBMITTED', 'QUEUED', 'RUNNING')

-- set_seen(id, was, state, reason, scheduler_id, exit_code, started_at, ended_at, ends_at)
-- Compare-and-set: what a launcher or another looker wrote meanwhile is newer than this listing. Without an
-- id no listing shows the job, which holds only as long as it is missed: a launcher that takes it ends that.
UPDATE batch_job
   SET state = $3, reason = $4, scheduler_id = coalesce(scheduler_id, $5::text), exit_code = coalesce($6, exit_code),
       submitted_at = CASE WHEN $5::text IS NULL THEN submitted_at ELSE coalesce(submitted_at, clock_timestamp()) END,
       started_at = coalesce($7, started_at),
       ended_at = CASE WHEN $3 IN ('FINISHED', 'FAILED', 'TIMEOUT', 'CANCELLED', 'LOST', 'REJECTED')
                       THEN coalesce($8, clock_timestamp()) END,
       ends_at = coalesce($9, ends_at), missing = 0, first_missing_at = NULL
 WHERE id = $1 AND state = $2 AND ($5::text IS NOT NULL OR missing > 0)
RETURNING id

-- set_error(id, error)
UPDATE batch_job SET error = $2 WHERE id = $1 AND record IS NULL

-- set_record(id, launcher, record)
-- The launcher's own last word; of one that holds the row.
UPDATE batch_job b SET record = $3
 WHERE b.id = $1
   AND EXISTS (SELECT 1 FROM launcher r WHERE r.id = $2 AND r.batch_job_id = b.id)
   AND NOT EXISTS (SELECT 1 FROM launcher r WHERE r.id > $2 AND r.batch_job_id = b.id)

-- select_batch_jobs(ids, only_active, limit)
-- The youngest first, each with the last launcher that took it.
SELECT b.id, coalesce(b.name, '') AS name, b.scheduler, b.scheduler_id, b.state, b.num_nodes,
       b.wall_time_minutes, b.job_mode, b.wf_filter, b.project, b.queue, b.policy, b.why, b.reason,
       b.exit_code, b.error, b.record, b.missing, b.created_at, b.submitted_at, b.started_at, b.ended_at,
       b.ends_at, b.spec, r.id AS launcher_id, l.id IS NOT NULL AS has_live_launcher,
       extract(epoch FROM clock_timestamp() - b.created_at)::float8 AS age_s,
       extract(epoch FROM clock_timestamp() - b.first_missing_at)::float8 AS missing_s
  FROM batch_job b
  LEFT JOIN LATERAL (SELECT max(x.id) AS id FROM launcher x WHERE x.batch_job_id = b.id) r ON true
  LEFT JOIN lease l ON l.launcher_id = r.id AND l.state = 'ACTIVE'
 WHERE b.id = ANY (coalesce($1::bigint[], CASE
         WHEN $2 THEN ARRAY (SELECT a.id FROM batch_job a
                              WHERE a.state IN ('NEW', 'SUBMITTED', 'QUEUED', 'RUNNING'))
         ELSE ARRAY (SELECT a.id FROM batch_job a ORDER BY a.id DESC LIMIT $3) END))
 ORDER BY b.id DESC

-- count_submitted(within_s)
-- Among the youngest thousand: no rate that is allowed comes near.
SELECT count(*)::int
  FROM (SELECT b.policy, b.created_at FROM batch_job b ORDER BY b.id DESC LIMIT 1000) b
 WHERE b.policy IS NOT NULL AND b.created_at > clock_timestamp() - make_interval(secs => $1::float8)

-- select_backlog(workflow_ids, limit, above, up_to)
-- What could run now on more than `above` and up to so many nodes, in claim order, as far as the limit goes.
-- Counted before it is given names.
SELECT w.name AS workflow, t.num_nodes, t.ranks_per_node, n.node_packing_count AS packing,
       n.gpus_per_rank::bigint * t.ranks_per_node AS gpus, n.memory_mb, t.wall_time_minutes,
       sum(t.tasks)::int AS tasks
  FROM (SELECT f.workflow_id, f.num_nodes, f.ranks_per_node, f.shape_id, f.wall_time_minutes, count(*) AS tasks
          FROM ((SELECT t.workflow_id, t.num_nodes, t.ranks_per_node, t.shape_id, t.wall_time_minutes
                   FROM task t
                  WHERE $1::int[] IS NULL AND t.num_nodes > $3 AND t.num_nodes <= $4
                    AND t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
                  ORDER BY t.priority DESC, t.num_nodes DESC, t.wall_time_minutes DESC, t.id
                  LIMIT $2)
                 UNION ALL
                (SELECT s.workflow_id, s.num_nodes, s.ranks_per_node, s.shape_id, s.wall_time_minutes
                   FROM unnest($1::int[]) AS x (id)
                  CROSS JOIN LATERAL (
                    SELECT t.workflow_id, t.num_nodes, t.ranks_per_node, t.shape_id, t.wall_time_minutes,
                           t.priority, t.id
                      FROM task t
                     WHERE t.workflow_id = x.id AND t.num_nodes > $3 AND t.num_nodes <= $4
                       AND t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
                     ORDER BY t.priority DESC, t.num_nodes DESC, t.wall_time_minutes DESC, t.id
                     LIMIT $2) s
                  ORDER BY s.priority DESC, s.num_nodes DESC, s.wall_time_minutes DESC, s.id
                  LIMIT $2)) f
         GROUP BY 1, 2, 3, 4, 5) t
  JOIN workflow w ON w.id = t.workflow_id
  JOIN shape n ON n.id = t.shape_id
 GROUP BY 1, 2, 3, 4, 5, 6, 7

-- select_soon(workflow_ids, parents, limit)
-- What waits only for tasks that run: it will want nodes when they end.
SELECT w.name AS workflow, t.num_nodes, t.ranks_per_node, n.node_packing_count AS packing,
       n.gpus_per_rank::bigint * t.ranks_per_node AS gpus, n.memory_mb, t.wall_time_minutes,
       count(*)::int AS tasks
  FROM (SELECT t.workflow_id, t.num_nodes, t.ranks_per_node, t.shape_id, t.wall_time_minutes
          FROM (SELECT p.id FROM task p WHERE p.lease_id IS NOT NULL AND p.state = 'RUNNING' LIMIT $2) p
          JOIN task_parent e ON e.parent_id = p.id AND e.waits
          JOIN task t ON t.id = e.child_id AND t.state = 'AWAITING_PARENTS' AND t.pending_parents = 1
         WHERE $1::int[] IS NULL OR t.workflow_id = ANY ($1)
         LIMIT $3) t
  JOIN workflow w ON w.id = t.workflow_id
  JOIN shape n ON n.id = t.shape_id
 GROUP BY 1, 2, 3, 4, 5, 6, 7

-- typical_minutes(limit)
-- How long tasks of each workflow take, by those that ended well among the youngest attempts.
SELECT w.name AS workflow, avg(extract(epoch FROM a.ended_at - a.started_at) / 60)::float8 AS minutes
  FROM (SELECT a.task_id, a.started_at, a.ended_at, a.outcome FROM attempt a
         ORDER BY a.task_id DESC, a.attempt DESC LIMIT $1) a
  JOIN task t ON t.id = a.task_id
  JOIN workflow w ON w.id = t.workflow_id
 WHERE a.outcome = 'done' AND a.started_at IS NOT NULL
 GROUP BY 1

-- select_capacity(assumed_minutes, workflows, minutes)
-- The launchers that run and were heard of lately, and how many node-minutes what they hold still takes: what
-- has outlived its estimate, or is being ended, another minute.
SELECT r.batch_job_id, r.job_mode, r.wf_filter, cardinality(r.nodes) AS nodes, r.node_gpus,
       coalesce((b.spec->>'slots_per_node')::int, 1) AS slots_per_node,
       (extract(epoch FROM r.ends_at - clock_timestamp()) / 60)::float8 AS left_minutes,
       coalesce((SELECT sum(
                   CASE WHEN r.job_mode <> 'serial' THEN t.num_nodes::float8
                        ELSE 1 / greatest(n.node_packing_count, (b.spec->>'slots_per_node')::int)::float8 END
                   * CASE t.state
                       WHEN 'RUNNING' THEN greatest(least(y.minutes, 1), y.minutes - extract(
                         epoch FROM clock_timestamp() - t.started_at)::float8 / 60)
                       WHEN 'PREPROCESSED' THEN y.minutes
                       WHEN 'RESTART_READY' THEN y.minutes
                       ELSE 1 END)
                   FROM task t
                   JOIN shape n ON n.id = t.shape_id
                   JOIN workflow w ON w.id = t.workflow_id
                   LEFT JOIN unnest($2::text[], $3::float8[]) AS k (workflow, minutes) ON k.workflow = w.name
                  CROSS JOIN LATERAL (
                    SELECT CASE WHEN t.wall_time_minutes > 0 THEN t.wall_time_minutes
                                ELSE coalesce(k.minutes, $1::float8) END AS minutes) y
                  WHERE t.lease_id = l.id), 0)::float8 AS busy
  FROM launcher r JOIN lease l ON l.launcher_id = r.id LEFT JOIN batch_job b ON b.id = r.batch_job_id
 WHERE l.state = 'ACTIVE' AND l.renewed_at > clock_timestamp() - interval '2 minutes'
 ORDER BY r.id

-- ================================================================ the service

-- try_service_lock()
-- Of the session: a crash frees it.
SELECT pg_try_advisory_lock(hashtext('ensemble.service'))

-- enter_service(host, pid, period_s)
UPDATE service
   SET epoch = epoch + 1, host = $1, pid = $2, period_s = $3, started_at = clock_timestamp(),
       seen_at = clock_timestamp(), stopped_at = NULL
RETURNING epoch

-- beat_service(epoch)
-- Nothing comes back when another has taken over.
UPDATE service SET seen_at = clock_timestamp() WHERE epoch = $1 RETURNING epoch

-- unlock_service()
SELECT pg_advisory_unlock(hashtext('ensemble.service'))

-- leave_service(epoch)
UPDATE service SET stopped_at = clock_timestamp() WHERE epoch = $1

-- select_service()
SELECT host, pid, period_s, started_at, seen_at, stopped_at,
       extract(epoch FROM clock_timestamp() - seen_at)::float8 AS silent_s
  FROM service

-- select_token()
-- What a backup was made of has another one than what it is restored to.
SELECT token FROM service

-- select_queue_states()
SELECT name, paused_by, paused_at, reason, failures, kind, retry_at,
       extract(epoch FROM retry_at - clock_timestamp())::float8 AS retry_s
  FROM queue_state ORDER BY name

-- pause_queue(name, by, reason)
-- What a user paused, the service leaves alone.
INSERT INTO queue_state AS q (name, paused_by, paused_at, reason)
VALUES ($1, $2, clock_timestamp(), $3)
ON CONFLICT (name) DO UPDATE
   SET paused_by = excluded.paused_by, paused_at = excluded.paused_at, reason = excluded.reason
 WHERE q.paused_by IS DISTINCT FROM 'user' OR excluded.paused_by = 'user'

-- resume_queue(name)
DELETE FROM queue_state WHERE name = $1 RETURNING name

-- note_failure(name, kind, reason, retry_s)
-- Returns how many of the same kind there were in a row.
INSERT INTO queue_state AS q (name, failures, kind, reason, retry_at)
VALUES ($1, 1, $2, $3, clock_timestamp() + make_interval(secs => $4::float8))
ON CONFLICT (name) DO UPDATE
   SET failures = CASE WHEN q.kind = excluded.kind THEN q.failures + 1 ELSE 1 END,
       kind = excluded.kind, retry_at = excluded.retry_at,
       reason = CASE WHEN q.paused_by IS NULL THEN excluded.reason ELSE q.reason END
RETURNING failures

-- note_success(name, kinds)
-- Ends a row of failures of these kinds.
UPDATE queue_state SET failures = 0, kind = NULL, retry_at = NULL,
       reason = CASE WHEN paused_by IS NULL THEN NULL ELSE reason END
 WHERE name = $1 AND kind = ANY ($2::text[])

-- note_decision(policy, reason, batch_job)
-- Only what is new: the same decision again is no news.
INSERT INTO decision (policy, reason, batch_job_id)
SELECT $1::text, $2::text, $3::bigint
 WHERE $3 IS NOT NULL OR $2 IS DISTINCT FROM (
   SELECT d.reason FROM decision d WHERE d.policy = $1 ORDER BY d.id DESC LIMIT 1)

-- forget_decisions(keep)
DELETE FROM decision WHERE id <= (SELECT max(id) FROM decision) - $1::bigint

-- select_decisions(limit)
SELECT at, policy, reason, batch_job_id FROM decision ORDER BY id DESC LIMIT $1

-- ================================================================ reaping

-- select_local_leases(host)
-- Live leases of launchers on this host: a process that is not there needs no silence as evidence.
SELECT l.id AS lease_id, r.host, r.boot_id, r.machine_id, r.pid_namespace, r.pid, r.start_ticks, r.guard_pid,
       r.guard_start_ticks
  FROM lease l JOIN launcher r ON r.id = l.launcher_id
 WHERE l.state = 'ACTIVE' AND r.host = $1

-- select_silent_leases(host)
-- Those of them that may be closed for silence (`expire_leases`): what runs under them here is ended first.
SELECT l.id
  FROM lease l JOIN launcher r ON r.id = l.launcher_id
 WHERE l.state = 'ACTIVE' AND r.host = $1 AND l.expires_at < clock_timestamp()
   AND pg_postmaster_start_time() + l.ttl < clock_timestamp()

-- select_lease_owner(lease)
-- Whose it is, and its mark (`Lease.mark`): a spool with another one is not of this lease.
SELECT concat_ws(' ', (SELECT token FROM service), r.boot_id, r.pid, r.start_ticks) AS mark, r.id AS launcher_id
  FROM (SELECT $1::bigint AS id) w LEFT JOIN lease l ON l.id = w.id LEFT JOIN launcher r ON r.id = l.launcher_id

-- unswept_leases()
SELECT id FROM lease WHERE state <> 'ACTIVE' AND NOT swept ORDER BY id

-- try_reaper_lock()
SELECT pg_try_advisory_xact_lock(hashtext('ensemble.reap'))

-- ================================================================ backup and restore

-- list_tables()
-- What a backup holds: not what the program brings itself. With the tables that foreign keys lead to.
SELECT c.relname::text AS name, array_agg(a.attname::text ORDER BY a.attnum) AS columns,
       ARRAY (SELECT p.relname::text FROM pg_constraint f JOIN pg_class p ON p.oid = f.confrelid
               WHERE f.conrelid = c.oid AND f.contype = 'f' AND p.oid <> c.oid) AS parents
  FROM pg_class c
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
 WHERE c.relnamespace = to_regnamespace('ensemble') AND c.relkind = 'r' AND c.relname ~ '^[a-z0-9_]+$'
   AND c.relname NOT IN ('schema_version', 'schema_script', 'move')
 GROUP BY c.oid, c.relname
 ORDER BY c.relname

-- list_identities()
-- The columns that number rows, and whether there is room to leave numbers out.
SELECT c.relname::text AS name, a.attname::text AS "column", a.atttypid = 'bigint'::regtype AS is_wide,
       pg_get_serial_sequence(c.oid::regclass::text, a.attname) AS sequence
  FROM pg_class c
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attidentity <> '' AND NOT a.attisdropped
 WHERE c.relnamespace = to_regnamespace('ensemble') AND c.relkind = 'r' AND c.relname ~ '^[a-z0-9_]+$'
 ORDER BY c.relname

-- select_migrations()
SELECT version, sha256 FROM schema_version ORDER BY version

-- count_contents()
-- What a restore would replace.
SELECT (SELECT count(*) FROM task) AS tasks, (SELECT count(*) FROM app) AS apps,
       (SELECT count(*) FROM launcher) AS launchers, (SELECT count(*) FROM batch_job) AS "batch jobs"

-- last_heard()
-- The live launcher that was heard of last; while the server was down, none could be.
SELECT r.id, r.host,
       extract(epoch FROM clock_timestamp() - greatest(l.renewed_at, pg_postmaster_start_time()))::float8
         AS silent_s
  FROM launcher r JOIN lease l ON l.launcher_id = r.id
 WHERE l.state = 'ACTIVE'
 ORDER BY silent_s
 LIMIT 1

-- close_restored_leases()
-- Their launchers may still run against the database that the backup was made of.
SELECT close_lease(l.id, 'EXPIRED', 'restored from a backup') FROM lease l
 WHERE l.state = 'ACTIVE'
 ORDER BY l.id

-- forgive_losses()
-- release_lost() counts a loss for each of these, and nothing was lost.
UPDATE task t SET losses = t.losses - 1
  FROM lease l
 WHERE l.id = t.lease_id AND l.evidence = 'restored from a backup' AND t.state = 'RUNNING'

-- give_up_batch_jobs()
-- A launcher that one of them starts is refused, and leaves.
UPDATE batch_job SET state = 'LOST', reason = 'restored from a backup', ended_at = clock_timestamp()
 WHERE state IN ('NEW', 'SUBMITTED', 'QUEUED', 'RUNNING')
RETURNING id

-- renew_service()
-- Of two sites with one token, each would take the other's batch jobs for its own.
UPDATE service
   SET token = substr(md5(gen_random_uuid()::text), 1, 6), epoch = epoch + 1, host = NULL, pid = NULL,
       period_s = NULL, started_at = NULL, seen_at = NULL, stopped_at = NULL

-- ================================================================ invariants: `ensemble db check`

-- check_orphans()
-- held, and so also running, implies a live lease, or one that is about to be swept
SELECT t.id, 'held by lease ' || t.lease_id || CASE
         WHEN l.id IS NULL OR l.swept THEN ', which does not exist'
         ELSE ', which was closed long ago: a launcher or the service would give it back' END AS problem
  FROM task t LEFT JOIN lease l ON l.id = t.lease_id
 WHERE t.lease_id IS NOT NULL
   AND (l.id IS NULL OR l.swept OR l.closed_at < clock_timestamp() - interval '10 minutes')

-- check_specs()
-- what it takes to run a task is on record
SELECT t.id, 'has no command on record' AS problem
  FROM task t LEFT JOIN task_spec s ON s.task_id = t.id
 WHERE s.task_id IS NULL

-- check_shapes()
-- what a task needs of a node is on record
SELECT t.id, 'has shape ' || t.shape_id || ', which does not exist' AS problem
  FROM task t LEFT JOIN shape n ON n.id = t.shape_id
 WHERE n.id IS NULL

-- check_open_attempts()
-- an attempt is open exactly while its task is held
SELECT t.id, 'open attempts do not match the hold' AS problem
  FROM task t
 WHERE (SELECT count(*) FROM attempt a WHERE a.task_id = t.id AND a.ended_at IS NULL)
       <> CASE WHEN t.lease_id IS NULL THEN 0 ELSE 1 END

-- check_successes()
-- a finished task has exactly one successful attempt, any other task has none
SELECT t.id, 'has ' || count(a.*) || ' successful attempts and is ' || t.state AS problem
  FROM task t LEFT JOIN attempt a ON a.task_id = t.id AND a.outcome = 'done'
 GROUP BY t.id, t.state
HAVING count(a.*) <> CASE WHEN t.state = 'JOB_FINISHED' THEN 1 ELSE 0 END

-- check_overlaps()
-- at any moment at most one attempt of a task is alive
SELECT a.task_id AS id, 'attempts ' || a.attempt || ' and ' || b.attempt || ' overlap' AS problem
  FROM attempt a JOIN attempt b ON b.task_id = a.task_id AND b.attempt > a.attempt
 WHERE b.claimed_at < a.ended_at OR a.ended_at IS NULL

-- check_attempts()
-- attempts are numbered without a gap, and no task counts more failures than it had
SELECT t.id, 'is at attempt ' || t.attempt || ', ' || count(a.*) || ' are on record' AS problem
  FROM task t LEFT JOIN attempt a ON a.task_id = t.id
 GROUP BY t.id, t.attempt
HAVING count(a.*) <> t.attempt OR coalesce(max(a.attempt), 0) <> t.attempt
 UNION ALL
SELECT t.id, 'counts ' || t.failures + t.timeouts + t.losses || ' attempts that failed, timed out or '
             || 'were lost, more than are on record'
  FROM task t
 WHERE t.failures + t.timeouts + t.losses > (
         SELECT count(*) FROM attempt a
          WHERE a.task_id = t.id AND a.outcome IN ('error', 'timeout', 'lost'))

-- check_counters()
-- waiting children count their parents right
SELECT c.id, 'waits for ' || c.pending_parents || ' parents, in truth ' || count(p.id) AS problem
  FROM task c
  LEFT JOIN task_parent e ON e.child_id = c.id AND e.waits
  LEFT JOIN task p ON p.id = e.parent_id AND p.state <> 'JOB_FINISHED'
 WHERE c.pending_parents > 0 OR c.state = 'AWAITING_PARENTS'
 GROUP BY c.id, c.pending_parents
HAVING count(p.id) <> c.pending_parents

-- check_histories()
-- every history is one chain of legal moves from CREATED to the task's state
SELECT x.task_id AS id, 'history breaks at ' || x.from_state || ' -> ' || x.to_state AS problem
  FROM (SELECT e.task_id, e.id, e.from_state, e.to_state, t.state,
               lag(e.to_state, 1, 'CREATED') OVER w AS before, lead(e.id) OVER w AS next_id
          FROM event e JOIN task t ON t.id = e.task_id
        WINDOW w AS (PARTITION BY e.task_id ORDER BY e.id)) x
  LEFT JOIN move m ON m.from_state = x.from_state AND m.to_state = x.to_state
 WHERE x.from_state <> x.before OR m.to_state IS NULL OR (x.next_id IS NULL AND x.to_state <> x.state)
 UNION ALL
SELECT t.id, 'has no history and is ' || t.state
  FROM task t
 WHERE t.state <> 'CREATED' AND NOT EXISTS (SELECT 1 FROM event e WHERE e.task_id = t.id)

-- check_stuck()
-- nothing waits for parents that can never finish, or in a state that nobody moves on
SELECT c.id, 'waits for a parent that failed' AS problem
  FROM task c JOIN task_parent e ON e.child_id = c.id AND e.waits
  JOIN task p ON p.id = e.parent_id AND p.state IN ('FAILED', 'USER_KILLED')
 WHERE c.state = 'AWAITING_PARENTS'
 UNION ALL
SELECT t.id, 'is ' || t.state || ', and nobody will move it on'
  FROM task t
 WHERE t.lease_id IS NULL
   AND t.state IN ('CREATED', 'READY', 'STAGED_IN', 'RUN_DONE', 'POSTPROCESSED', 'RUN_ERROR', 'RUN_TIMEOUT')
