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
SELECT t.id, t.state
  FROM task t
  JOIN task_spec s ON s.task_id = t.id
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
SELECT r.id, l.id AS lease_id, r.host, r.pid, r.job_mode, r.wf_filter, r.nodes, r.scheduler,
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

-- ================================================================ reaping

-- select_local_leases(host)
-- Live leases of launchers on this host: a process that is not there needs no silence as evidence.
SELECT l.id AS lease_id, r.host, r.boot_id, r.machine_id, r.pid_namespace, r.pid, r.start_ticks, r.guard_pid,
       r.guard_start_ticks
  FROM lease l JOIN launcher r ON r.id = l.launcher_id
 WHERE l.state = 'ACTIVE' AND r.host = $1

-- unswept_leases()
SELECT id FROM lease WHERE state <> 'ACTIVE' AND NOT swept ORDER BY id

-- try_reaper_lock()
SELECT pg_try_advisory_xact_lock(hashtext('ensemble.reap'))

-- ================================================================ invariants: `ensemble db check`

-- check_orphans()
-- held implies a live lease, or one that is about to be swept
SELECT t.id, 'held by lease ' || t.lease_id || ', which does not exist' AS problem
  FROM task t LEFT JOIN lease l ON l.id = t.lease_id
 WHERE t.lease_id IS NOT NULL AND (l.id IS NULL OR l.swept)

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
-- nothing waits for parents that can never finish
SELECT c.id, 'waits for a parent that failed' AS problem
  FROM task c JOIN task_parent e ON e.child_id = c.id AND e.waits
  JOIN task p ON p.id = e.parent_id AND p.state IN ('FAILED', 'USER_KILLED')
 WHERE c.state = 'AWAITING_PARENTS'
