-- Functions and the trigger: applied again whenever this file changes.
-- Locks are taken in the order lease, task (by id), children (by id); whoever may still deadlock
-- is retried by the store. Error codes: EN001 lease lost, EN002 illegal move, EN003 nodes taken,
-- EN004 held.

-- ------------------------------------------------------------------------------- the trigger

-- fail_descendants(ids): what waits for a task that will never finish fails with it.
CREATE OR REPLACE FUNCTION fail_descendants(p_dead bigint[]) RETURNS void
LANGUAGE sql VOLATILE SET search_path = ensemble, pg_temp AS $$
  WITH RECURSIVE down (id, parent_id) AS (
    SELECT e.child_id, e.parent_id
      FROM task_parent e JOIN task c ON c.id = e.child_id
     WHERE e.parent_id = ANY (p_dead) AND e.waits AND c.state = 'AWAITING_PARENTS'
    UNION
    SELECT e.child_id, e.parent_id
      FROM down d JOIN task_parent e ON e.parent_id = d.id JOIN task c ON c.id = e.child_id
     WHERE e.waits AND c.state = 'AWAITING_PARENTS'
  ), first_parent AS MATERIALIZED (
    SELECT id, min(parent_id) AS parent_id FROM down GROUP BY id
  ), locked AS MATERIALIZED (
    SELECT t.id FROM task t JOIN first_parent f USING (id) ORDER BY t.id FOR NO KEY UPDATE OF t
  )
  UPDATE task t
     SET state = 'FAILED', cause = 'parent', reason = 'task ' || f.parent_id,
         ended_at = clock_timestamp()
    FROM locked l JOIN first_parent f USING (id)
   WHERE t.id = l.id AND t.state = 'AWAITING_PARENTS'
$$;

-- release_children(ids): one parent less to wait for; the last one sets a child free. Whom somebody
-- has set free before, by plain SQL, may wait for fewer than there are.
CREATE OR REPLACE FUNCTION release_children(p_done bigint[]) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp SET enable_seqscan = off AS $$
DECLARE
  v_ids bigint[];
  v_finished int[];
BEGIN
  -- By way of arrays: the planner would read all tasks wherever some have very many children.
  SELECT array_agg(c.id), array_agg(c.finished) INTO v_ids, v_finished FROM (
    SELECT child_id AS id, count(*)::int AS finished
      FROM task_parent WHERE parent_id = ANY (p_done) AND waits GROUP BY child_id) c;
  PERFORM 1 FROM task t WHERE t.id = ANY (v_ids) ORDER BY t.id FOR NO KEY UPDATE;
  UPDATE task t
     SET pending_parents = greatest(t.pending_parents - c.finished, 0),
         state = CASE WHEN t.state = 'AWAITING_PARENTS' AND t.pending_parents <= c.finished
                      THEN 'PREPROCESSED' ELSE t.state END
    FROM unnest(v_ids, v_finished) AS c (id, finished)
   WHERE t.id = c.id;
END $$;

-- has_children(ids): whether anything waits for them. Where few tasks have very many children, the
-- planner expects one of these in the first row that it reads, and those without any are looked for
-- in all rows.
CREATE OR REPLACE FUNCTION has_children(p_ids bigint[]) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp SET enable_seqscan = off AS $$
BEGIN
  RETURN EXISTS (SELECT 1 FROM task_parent WHERE parent_id = ANY (p_ids) AND waits);
END $$;

-- task_moved(): for every writer, psql included: refuses an illegal move, writes the history, rings
-- the bell on a kill, and tells the descendants. Children are handled by statements of their own,
-- that is, with a snapshot taken after the parents were locked: a child that was being added
-- meanwhile is seen. Where a snapshot is the whole transaction's it is not, and nothing may end.
CREATE OR REPLACE FUNCTION task_moved() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = ensemble, pg_temp AS $$
DECLARE
  v_bad bigint;
  v_was text;
  v_wanted text;
  v_is_legal boolean;
  v_done bigint[];
  v_dead bigint[];
  v_kill boolean;
BEGIN
  -- Old and new rows are paired by GROUP BY, not by a join: a session plans this once, for as many
  -- rows as its first statement had, and a nested loop planned for one row is quadratic for 10^4.
  WITH pair AS MATERIALIZED (
    SELECT id, max(was) AS was, max(wanted) AS wanted, max(attempt) AS attempt,
           max(lease_id) AS lease_id, bool_or(is_held) AS is_held,
           max(old_why) AS old_why, max(why) AS why
      FROM (SELECT id, state AS was, NULL AS wanted, NULL::int AS attempt, lease_id,
                   false AS is_held, concat_ws(': ', cause, reason) AS old_why, NULL AS why
              FROM old_rows
             UNION ALL
            SELECT id, NULL, state, attempt, lease_id, lease_id IS NOT NULL, NULL,
                   concat_ws(': ', cause, reason)
              FROM new_rows) x
     GROUP BY id HAVING max(was) IS DISTINCT FROM max(wanted)
  ), bad AS MATERIALIZED (
    SELECT p.id, p.was, p.wanted, m.from_state IS NOT NULL AS is_legal
      FROM pair p LEFT JOIN move m ON m.from_state = p.was AND m.to_state = p.wanted
     WHERE m.from_state IS NULL OR (p.is_held AND p.wanted IN ('PREPROCESSED', 'RESTART_READY'))
     ORDER BY p.id LIMIT 1
  ), written AS (
    INSERT INTO event (task_id, at, from_state, to_state, attempt, lease_id, actor, reason)
    SELECT id, clock_timestamp(), was, wanted, attempt, lease_id, session_user,
           CASE WHEN why <> old_why THEN nullif(why, '') END
      FROM pair WHERE NOT EXISTS (SELECT 1 FROM bad)
     ORDER BY id
    RETURNING task_id, to_state, lease_id
  )
  SELECT array_agg(task_id) FILTER (WHERE to_state = 'JOB_FINISHED'),
         array_agg(task_id) FILTER (WHERE to_state IN ('FAILED', 'USER_KILLED')),
         bool_or(to_state = 'USER_KILLED' AND lease_id IS NOT NULL),
         max(b.id), max(b.was), max(b.wanted), bool_or(b.is_legal)
    INTO v_done, v_dead, v_kill, v_bad, v_was, v_wanted, v_is_legal
    FROM written FULL JOIN bad b ON false;
  IF v_is_legal THEN
    RAISE EXCEPTION 'task % is held by a launcher: it cannot become % before its process is gone',
      v_bad, v_wanted USING ERRCODE = 'EN004';
  ELSIF v_bad IS NOT NULL THEN
    RAISE EXCEPTION 'task % is % and cannot become %', v_bad, v_was, v_wanted
      USING ERRCODE = 'EN002';
  END IF;
  IF (v_done || v_dead) IS NOT NULL
     AND current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
    RAISE EXCEPTION 'task % cannot end in a % transaction, which may miss its children: BEGIN ISOLATION LEVEL READ COMMITTED',
      (v_done || v_dead)[1], current_setting('transaction_isolation') USING ERRCODE = 'EN002';
  END IF;
  IF v_kill THEN
    PERFORM pg_notify('ensemble_kill', '');
  END IF;
  -- Most tasks have no children.
  IF v_done IS NOT NULL AND has_children(v_done) THEN
    PERFORM release_children(v_done);
  END IF;
  IF v_dead IS NOT NULL AND has_children(v_dead) THEN
    PERFORM fail_descendants(v_dead);
  END IF;
  RETURN NULL;
END $$;

-- task_added(): the first line of every history.
CREATE OR REPLACE FUNCTION task_added() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = ensemble, pg_temp AS $$
DECLARE
  v_bad record;
BEGIN
  SELECT n.id, n.state INTO v_bad FROM new_rows n
   WHERE n.state <> 'CREATED'
     AND NOT EXISTS (SELECT 1 FROM move m WHERE m.from_state = 'CREATED' AND m.to_state = n.state)
   LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'a new task cannot be %', v_bad.state USING ERRCODE = 'EN002';
  END IF;
  INSERT INTO event (task_id, at, from_state, to_state, attempt, actor, reason)
  SELECT id, clock_timestamp(), 'CREATED', state, attempt, session_user,
         nullif(concat_ws(': ', cause, reason), '')
    FROM new_rows WHERE state <> 'CREATED' ORDER BY id;
  RETURN NULL;
END $$;

-- is_waited_for(parent_state, child_state, child_pending): whether a child would never run, or
-- never again, without this parent's row.
CREATE OR REPLACE FUNCTION is_waited_for(p_parent text, p_child text, p_pending int)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
  SELECT p_child = 'AWAITING_PARENTS' OR (p_parent <> 'JOB_FINISHED' AND p_pending > 0)
$$;

-- task_removed(): what is held may still have a process, and what is waited for decides about
-- others; neither can be removed.
CREATE OR REPLACE FUNCTION task_removed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = ensemble, pg_temp AS $$
DECLARE
  v_id bigint;
  v_child bigint;
BEGIN
  SELECT id INTO v_id FROM old_rows WHERE lease_id IS NOT NULL LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'task % is held by a launcher and cannot be removed', v_id
      USING ERRCODE = 'EN004';
  END IF;
  SELECT o.id, c.id INTO v_id, v_child
    FROM old_rows o
    JOIN task_parent e ON e.parent_id = o.id AND e.waits
    JOIN task c ON c.id = e.child_id
   WHERE is_waited_for(o.state, c.state, c.pending_parents)
   LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'task % waits for task %, which cannot be removed before it', v_child, v_id
      USING ERRCODE = 'EN004';
  END IF;
  DELETE FROM task_spec s USING old_rows o WHERE s.task_id = o.id;
  DELETE FROM task_parent p USING old_rows o WHERE p.child_id = o.id OR p.parent_id = o.id;
  DELETE FROM attempt a USING old_rows o WHERE a.task_id = o.id;
  DELETE FROM event e USING old_rows o WHERE e.task_id = o.id;
  RETURN NULL;
END $$;

DROP TRIGGER IF EXISTS task_moved ON task;
CREATE TRIGGER task_moved AFTER UPDATE ON task
  REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
  FOR EACH STATEMENT EXECUTE FUNCTION task_moved();
DROP TRIGGER IF EXISTS task_added ON task;
CREATE TRIGGER task_added AFTER INSERT ON task
  REFERENCING NEW TABLE AS new_rows
  FOR EACH STATEMENT EXECUTE FUNCTION task_added();
DROP TRIGGER IF EXISTS task_removed ON task;
CREATE TRIGGER task_removed AFTER DELETE ON task
  REFERENCING OLD TABLE AS old_rows
  FOR EACH STATEMENT EXECUTE FUNCTION task_removed();

-- ------------------------------------------------------------------------------- leases

-- is_lease_active(lease): if so, holds it against the reaper (who takes FOR UPDATE) until commit.
CREATE OR REPLACE FUNCTION is_lease_active(p_lease bigint) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
BEGIN
  PERFORM 1 FROM lease WHERE id = p_lease AND state = 'ACTIVE' FOR KEY SHARE;
  RETURN FOUND;
END $$;

-- ------------------------------------------------------------------------------- batch jobs

-- open_batch_job(...): the row of a batch job that is about to be submitted; nothing where its policy has
-- as many as it may, or another service has taken over. One at a time, so that no two exceed a limit together.
CREATE OR REPLACE FUNCTION open_batch_job(
  p_site text, p_scheduler text, p_num_nodes int, p_minutes int, p_job_mode text, p_wf_filter text,
  p_project text, p_queue text, p_policy text, p_why text, p_spec jsonb, p_limit int, p_epoch bigint
) RETURNS bigint
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
DECLARE
  v_id bigint;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtext('ensemble.open_batch_job'));
  IF p_epoch IS NOT NULL THEN
    -- Locked: whoever takes over waits for this row, and then sees it.
    PERFORM 1 FROM service s WHERE s.epoch = p_epoch FOR SHARE;
    IF NOT FOUND THEN
      RETURN NULL;
    END IF;
  END IF;
  IF p_limit IS NOT NULL AND p_limit <= (
      SELECT count(*) FROM batch_job b
       WHERE b.policy IS NOT DISTINCT FROM p_policy AND b.state IN ('NEW', 'SUBMITTED', 'QUEUED', 'RUNNING')) THEN
    RETURN NULL;
  END IF;
  INSERT INTO batch_job (scheduler, num_nodes, wall_time_minutes, job_mode, wf_filter, project, queue,
                         policy, why, spec)
  VALUES (p_scheduler, p_num_nodes, p_minutes, p_job_mode, p_wf_filter, p_project, p_queue, p_policy, p_why,
          p_spec)
  RETURNING id INTO v_id;
  UPDATE batch_job b SET name = concat('ens-', p_site, '-', (SELECT s.token FROM service s), '-', v_id)
   WHERE b.id = v_id;
  RETURN v_id;
END $$;

-- job_number(id): what all spellings of a scheduler's job id share: `12;cluster`, `12.server` and `12.server.site`
-- are one job, and so are Flux's two.
CREATE OR REPLACE FUNCTION job_number(p_id text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = ensemble, pg_temp AS $$
  SELECT replace(regexp_replace(p_id, '[.;].*$', ''), 'ƒ', 'f')
$$;

-- take_batch_job(...): by compare-and-set; refused are the launchers of a job that was given up or is being
-- cancelled, of another submission of the same row, and a second one while the first may live.
CREATE OR REPLACE FUNCTION take_batch_job(
  p_id bigint, p_scheduler text, p_scheduler_job_id text, p_ends_at timestamptz
) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
DECLARE
  v batch_job;
  v_other bigint;
BEGIN
  SELECT * INTO v FROM batch_job b WHERE b.id = p_id FOR UPDATE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'batch job % is not on record here: was its site made anew?', p_id
      USING ERRCODE = 'EN003';
  END IF;
  IF v.state NOT IN ('NEW', 'SUBMITTED', 'QUEUED', 'RUNNING') THEN
    RAISE EXCEPTION 'batch job % was given up (%: %)', p_id, v.state, coalesce(v.reason, 'no reason on record')
      USING ERRCODE = 'EN003';
  END IF;
  IF v.spec ? 'cancelled' THEN
    RAISE EXCEPTION 'batch job % is being cancelled (%)', p_id, v.spec->>'cancelled' USING ERRCODE = 'EN003';
  END IF;
  -- An id that nobody knows yet may be any, but it is one of the scheduler that the job was submitted to.
  IF v.scheduler <> p_scheduler OR p_scheduler_job_id IS NULL
     OR job_number(coalesce(v.scheduler_id, p_scheduler_job_id)) <> job_number(p_scheduler_job_id) THEN
    RAISE EXCEPTION 'batch job % is % job %, and this launcher runs in %', p_id, v.scheduler,
      coalesce(v.scheduler_id, '(id unknown)'), coalesce(p_scheduler || ' job ' || p_scheduler_job_id, 'none')
      USING ERRCODE = 'EN003';
  END IF;
  SELECT r.id INTO v_other
    FROM launcher r JOIN lease l ON l.launcher_id = r.id AND l.state = 'ACTIVE'
   WHERE r.batch_job_id = p_id
   LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'launcher % has batch job % still: its lease has not ended', v_other, p_id
      USING ERRCODE = 'EN003';
  END IF;
  UPDATE batch_job b
     SET state = 'RUNNING', scheduler_id = coalesce(b.scheduler_id, p_scheduler_job_id),
         submitted_at = coalesce(b.submitted_at, clock_timestamp()),
         started_at = coalesce(b.started_at, clock_timestamp()), ends_at = coalesce(p_ends_at, b.ends_at),
         missing = 0, first_missing_at = NULL, reason = NULL, record = NULL, error = NULL, exit_code = NULL
   WHERE b.id = p_id;
END $$;

-- register_launcher(...): a launcher and its lease; nodes of one batch job serve one launcher. One that
-- a batch job of ours has started takes the job's row with it, or is refused.
CREATE OR REPLACE FUNCTION register_launcher(
  p_identity jsonb, p_version text, p_job_mode text, p_wf_filter text, p_nodes text[],
  p_scheduler text, p_scheduler_job_id text, p_restart_count int, p_left interval, p_ttl interval,
  p_node_cores int, p_node_gpus int, p_linger interval, p_batch_job bigint
) RETURNS TABLE (launcher_id bigint, lease_id bigint)
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
DECLARE
  v_other bigint;
  v_launcher bigint;
  v_lease bigint;
BEGIN
  PERFORM pg_advisory_xact_lock(hashtext('ensemble.register_launcher'));
  IF p_scheduler_job_id IS NOT NULL THEN
    SELECT r.id INTO v_other
      FROM launcher r JOIN lease l ON l.launcher_id = r.id AND l.state = 'ACTIVE'
     WHERE r.scheduler = p_scheduler AND r.scheduler_job_id = p_scheduler_job_id
       AND r.nodes && p_nodes
     LIMIT 1;
    IF FOUND THEN
      RAISE EXCEPTION 'launcher % of batch job % still holds nodes of this allocation',
        v_other, p_scheduler_job_id USING ERRCODE = 'EN003';
    END IF;
  END IF;
  IF p_batch_job IS NOT NULL THEN
    PERFORM take_batch_job(p_batch_job, p_scheduler, p_scheduler_job_id, clock_timestamp() + p_left);
  END IF;
  INSERT INTO launcher (batch_job_id, host, boot_id, machine_id, pid_namespace, pid, start_ticks, guard_pid,
                        guard_start_ticks, version, job_mode, wf_filter, nodes, scheduler,
                        scheduler_job_id, restart_count, ends_at, node_cores, node_gpus)
  VALUES (p_batch_job, p_identity->>'host', p_identity->>'boot_id', p_identity->>'machine_id',
          p_identity->>'pid_namespace',
          (p_identity->>'pid')::int, (p_identity->>'start_ticks')::bigint,
          (p_identity->>'guard_pid')::int, (p_identity->>'guard_start_ticks')::bigint,
          p_version, p_job_mode, p_wf_filter, p_nodes, p_scheduler, p_scheduler_job_id,
          p_restart_count, clock_timestamp() + p_left, p_node_cores, p_node_gpus)
  RETURNING id INTO v_launcher;
  INSERT INTO lease (launcher_id, ttl, expires_at, linger)
  VALUES (v_launcher, p_ttl, clock_timestamp() + p_ttl, p_linger)
  RETURNING id INTO v_lease;
  RETURN QUERY SELECT v_launcher, v_lease;
END $$;

-- close_lease(lease, state, evidence): ends a launcher's right to its tasks, once.
CREATE OR REPLACE FUNCTION close_lease(p_lease bigint, p_state text, p_evidence text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
BEGIN
  PERFORM 1 FROM lease WHERE id = p_lease AND state = 'ACTIVE' FOR UPDATE;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  UPDATE lease SET state = p_state, closed_at = clock_timestamp(), evidence = p_evidence
   WHERE id = p_lease;
  UPDATE launcher r SET ended_at = clock_timestamp(), end_reason = p_evidence
    FROM lease l WHERE l.id = p_lease AND r.id = l.launcher_id;
  RETURN true;
END $$;

-- bury_launcher(lease, state, evidence): the launcher is certainly gone. Its lease ends with it; or, where
-- pilots of it may live on other hosts, once the last of them must have ended.
CREATE OR REPLACE FUNCTION bury_launcher(p_lease bigint, p_state text, p_evidence text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
DECLARE
  v_linger interval;
BEGIN
  SELECT linger INTO v_linger FROM lease WHERE id = p_lease AND state = 'ACTIVE' FOR UPDATE;
  IF NOT FOUND OR v_linger = '0' THEN
    RETURN close_lease(p_lease, p_state, p_evidence);
  END IF;
  UPDATE lease
     SET ttl = least(ttl, linger), expires_at = least(expires_at, clock_timestamp() + linger)
   WHERE id = p_lease;
  RETURN false;
END $$;

-- expire_leases(p_spare): closes leases, but for some, whose launcher was silent for its whole ttl, or whose batch job
-- has ended. The database itself must have been up for as long, so that after its own outage
-- everybody can renew first.
DROP FUNCTION IF EXISTS expire_leases();
CREATE OR REPLACE FUNCTION expire_leases(p_spare bigint[]) RETURNS TABLE (lease_id bigint)
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
DECLARE
  v record;
BEGIN
  FOR v IN
    SELECT l.id, b.state AS job_state
      FROM lease l
      JOIN launcher r ON r.id = l.launcher_id
      LEFT JOIN batch_job b ON b.id = r.batch_job_id
        AND b.state IN ('FINISHED', 'FAILED', 'TIMEOUT', 'CANCELLED')
     WHERE l.state = 'ACTIVE' AND l.id <> ALL (p_spare)
       AND (b.id IS NOT NULL
            OR (l.expires_at < clock_timestamp()
                AND pg_postmaster_start_time() + l.ttl < clock_timestamp()))
     ORDER BY l.id
       FOR UPDATE OF l SKIP LOCKED
  LOOP
    PERFORM close_lease(v.id, 'EXPIRED',
      coalesce('its batch job is ' || v.job_state, 'not heard of for its whole lease'));
    lease_id := v.id;
    RETURN NEXT;
  END LOOP;
END $$;

-- ------------------------------------------------------------------------------- claim

-- What a claim hands over: all that it takes to run a task.
DROP TYPE IF EXISTS claimed CASCADE;
CREATE TYPE claimed AS (
  id bigint, attempt int, name text, workflow text, app text, argv text[], workdir text,
  num_nodes int, ranks_per_node int, threads_per_rank int, threads_per_core int,
  gpus_per_rank int, memory_mb int, node_packing_count int, wall_time_minutes int,
  time_limit_minutes double precision, output text, environ jsonb, env_script text,
  mpi_flags text[], cpu_affinity text, parent_ids bigint[], is_suspect boolean
);

-- hand_over(lease, ids): takes what a claim has locked, opens the attempts, and returns the tasks
-- in claim order: one round trip for all.
CREATE OR REPLACE FUNCTION hand_over(p_lease bigint, p_ids bigint[]) RETURNS SETOF claimed
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
BEGIN
  RETURN QUERY
    WITH taken AS (
      UPDATE task t SET lease_id = p_lease, attempt = t.attempt + 1
       WHERE t.id = ANY (p_ids)
      RETURNING t.id, t.attempt, t.workflow_id, t.app_id, t.shape_id, t.num_nodes, t.ranks_per_node,
                t.wall_time_minutes, t.priority
    ), opened AS (
      INSERT INTO attempt (task_id, attempt, lease_id)
      SELECT k.id, k.attempt, p_lease FROM taken k
    )
    SELECT k.id, k.attempt, s.name, w.name, a.name, s.argv, s.workdir, k.num_nodes,
           k.ranks_per_node, n.threads_per_rank, n.threads_per_core, n.gpus_per_rank, n.memory_mb,
           n.node_packing_count, k.wall_time_minutes, s.time_limit_minutes, s.output, s.environ,
           s.env_script, s.mpi_flags, s.cpu_affinity,
           ARRAY (SELECT p.parent_id FROM task_parent p WHERE p.child_id = k.id ORDER BY 1),
           -- It may be what its last launcher died of.
           k.attempt > 1 AND coalesce('launcher lost' = (
             SELECT b.cause FROM attempt b
              WHERE b.task_id = k.id AND b.outcome <> 'given back'
              ORDER BY b.attempt DESC LIMIT 1), false)
      FROM taken k
      JOIN task_spec s ON s.task_id = k.id
      JOIN workflow w ON w.id = k.workflow_id
      JOIN shape n ON n.id = k.shape_id
      LEFT JOIN app a ON a.id = k.app_id
     ORDER BY k.priority DESC, k.num_nodes DESC, k.wall_time_minutes DESC, k.id;
END $$;

-- next_size(workflows, priority, nodes): the first (priority, num_nodes) of runnable tasks
-- at or after the given one in claim order: one descent of an index per workflow.
CREATE OR REPLACE FUNCTION next_size(p_workflows int[], p_priority int, p_nodes int)
RETURNS TABLE (priority int, num_nodes int)
LANGUAGE plpgsql STABLE SET search_path = ensemble, pg_temp AS $$
BEGIN
  IF p_workflows IS NULL THEN
    RETURN QUERY
      SELECT t.priority, t.num_nodes FROM task t
       WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
         AND (t.priority, t.num_nodes) <= (p_priority, p_nodes)
       ORDER BY t.priority DESC, t.num_nodes DESC, t.wall_time_minutes DESC, t.id
       LIMIT 1;
  ELSE
    RETURN QUERY
      SELECT s.priority, s.num_nodes
        FROM unnest(p_workflows) AS w (id)
       CROSS JOIN LATERAL (
         SELECT t.priority, t.num_nodes FROM task t
          WHERE t.workflow_id = w.id
            AND t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
            AND (t.priority, t.num_nodes) <= (p_priority, p_nodes)
          ORDER BY t.priority DESC, t.num_nodes DESC, t.wall_time_minutes DESC, t.id
          LIMIT 1) s
       ORDER BY s.priority DESC, s.num_nodes DESC
       LIMIT 1;
  END IF;
END $$;

-- lock_runnable(workflows, priority, nodes, minutes, limit): the longest tasks of one size that
-- still fit the time, locked; what somebody else has locked is skipped.
CREATE OR REPLACE FUNCTION lock_runnable(
  p_workflows int[], p_priority int, p_nodes int, p_minutes int, p_limit int
) RETURNS SETOF bigint
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
BEGIN
  IF p_workflows IS NULL THEN
    RETURN QUERY
      SELECT t.id FROM task t
       WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
         AND t.priority = p_priority AND t.num_nodes = p_nodes
         AND t.wall_time_minutes <= p_minutes
       ORDER BY t.wall_time_minutes DESC, t.id
       LIMIT p_limit
         FOR NO KEY UPDATE SKIP LOCKED;
  ELSE
    RETURN QUERY
      SELECT s.id
        FROM unnest(p_workflows) AS w (id)
       CROSS JOIN LATERAL (
         SELECT t.id, t.wall_time_minutes FROM task t
          WHERE t.workflow_id = w.id
            AND t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
            AND t.priority = p_priority AND t.num_nodes = p_nodes
            AND t.wall_time_minutes <= p_minutes
          ORDER BY t.wall_time_minutes DESC, t.id
          LIMIT p_limit
            FOR NO KEY UPDATE SKIP LOCKED) s
       ORDER BY s.wall_time_minutes DESC, s.id
       LIMIT p_limit;
  END IF;
END $$;

-- claim_tasks(lease, workflows, nodes, minutes, ahead, limit): for whole free nodes, the best tasks
-- that fit: priority, then larger, then longer; and up to `ahead` single-node tasks more, to start
-- as nodes become free. Exact greedy order; locks little more than it takes.
CREATE OR REPLACE FUNCTION claim_tasks(
  p_lease bigint, p_workflows int[], p_nodes int, p_minutes int, p_ahead int, p_limit int
) RETURNS SETOF claimed
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
DECLARE
  v_ids bigint[] := '{}';
  v_more bigint[];
  v_free int := p_nodes + p_ahead;
  v_widest int;
  v_size record;
  v_priority int := 2147483647;
  v_nodes int := 2147483647;
  v_probes int := 0;
BEGIN
  IF NOT is_lease_active(p_lease) THEN
    RAISE EXCEPTION 'lease % is not active', p_lease USING ERRCODE = 'EN001';
  END IF;
  WHILE v_free > 0 AND cardinality(v_ids) < p_limit AND v_probes < 250 LOOP
    v_probes := v_probes + 1;
    v_widest := greatest(v_free - p_ahead, 1);   -- what is taken ahead is one node wide
    v_nodes := least(v_nodes, v_widest);
    IF v_probes = 200 THEN
      -- So many sizes and priorities, and nothing that fits: one walk along the index to what does.
      EXIT WHEN v_ids <> '{}';
      SELECT t.priority, t.num_nodes INTO v_priority, v_nodes FROM task t
       WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
         AND (t.priority, t.num_nodes) <= (v_priority, v_nodes)
         AND t.num_nodes <= v_widest AND t.wall_time_minutes <= p_minutes
         AND (p_workflows IS NULL OR t.workflow_id = ANY (p_workflows))
       ORDER BY t.priority DESC, t.num_nodes DESC, t.wall_time_minutes DESC, t.id
       LIMIT 1;
      EXIT WHEN NOT FOUND;
    END IF;
    SELECT * INTO v_size FROM next_size(p_workflows, v_priority, v_nodes);
    EXIT WHEN NOT FOUND;
    v_priority := v_size.priority;
    v_nodes := v_size.num_nodes;
    CONTINUE WHEN v_nodes > v_widest;            -- too wide for what is left: look below it
    SELECT coalesce(array_agg(l), '{}') INTO v_more
      FROM lock_runnable(p_workflows, v_priority, v_nodes, p_minutes,
                         least(CASE WHEN v_nodes = 1 THEN v_free ELSE v_widest / v_nodes END,
                               p_limit - cardinality(v_ids))) l;
    v_ids := v_ids || v_more;
    v_free := v_free - v_nodes * cardinality(v_more);
    v_nodes := v_nodes - 1;
    IF v_nodes = 0 THEN                          -- done with this priority
      EXIT WHEN v_priority = -2147483648;
      v_priority := v_priority - 1;
      v_nodes := 2147483647;
    END IF;
  END LOOP;
  IF v_ids <> '{}' THEN
    RETURN QUERY SELECT * FROM hand_over(p_lease, v_ids);
  END IF;
END $$;

-- ------------------------------------------------------------------------------- claim, serial mode
-- Tasks of one rank share nodes. What such a task needs of its node is its shape; a kind is a
-- shape, of one workflow where the claim is filtered. Claim order is priority, longer, older.
-- `greatest(num_nodes, ranks_per_node) = 1` is written as the serial indexes have it: no other index can
-- serve that, and one by shape is the only one that does not read what is of other shapes.

-- list_kinds(workflows, after, limit): the kinds of what can run, by shape, from the first shape
-- above `after`: one descent of the index a kind.
CREATE OR REPLACE FUNCTION list_kinds(p_workflows int[], p_after int, p_limit int)
RETURNS TABLE (workflow_id int, shape_id int)
LANGUAGE plpgsql STABLE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
BEGIN
  IF p_workflows IS NULL THEN
    RETURN QUERY
      WITH RECURSIVE kind (shape_id) AS (
        SELECT p_after
         UNION ALL
        SELECT n.shape_id FROM kind k CROSS JOIN LATERAL (
          SELECT t.shape_id FROM task t
           WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
             AND greatest(t.num_nodes, t.ranks_per_node) = 1 AND t.shape_id > k.shape_id
           ORDER BY t.shape_id, t.priority DESC, t.wall_time_minutes DESC, t.id
           LIMIT 1) n
      )
      SELECT NULL::int, k.shape_id FROM kind k OFFSET 1 LIMIT p_limit;
  ELSE
    RETURN QUERY
      SELECT w.id, s.shape_id
        FROM unnest(p_workflows) AS w (id)
       CROSS JOIN LATERAL (
         WITH RECURSIVE kind (shape_id) AS (
           SELECT p_after
            UNION ALL
           SELECT n.shape_id FROM kind k CROSS JOIN LATERAL (
             SELECT t.shape_id FROM task t
              WHERE t.workflow_id = w.id
                AND t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
                AND greatest(t.num_nodes, t.ranks_per_node) = 1 AND t.shape_id > k.shape_id
              ORDER BY t.shape_id, t.priority DESC, t.wall_time_minutes DESC, t.id
              LIMIT 1) n
         )
         SELECT k.shape_id FROM kind k OFFSET 1 LIMIT p_limit) s
       LIMIT p_limit;
  END IF;
END $$;

-- leading_kinds(workflows, minutes, limit): the kinds of the first so many tasks in claim order.
CREATE OR REPLACE FUNCTION leading_kinds(p_workflows int[], p_minutes int, p_limit int)
RETURNS TABLE (workflow_id int, shape_id int)
LANGUAGE plpgsql STABLE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
DECLARE
  v_priority int := 2147483647;
  v_found int := 0;
  v_more int;
BEGIN
  FOR probe IN 1..50 LOOP
    SELECT s.priority INTO v_priority FROM next_size(p_workflows, v_priority, 1) s;
    EXIT WHEN NOT FOUND;
    IF p_workflows IS NULL THEN
      RETURN QUERY
        SELECT NULL::int, x.shape_id
          FROM (SELECT t.shape_id, t.ranks_per_node FROM task t
                 WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
                   AND t.priority = v_priority AND t.num_nodes = 1
                   AND t.wall_time_minutes <= p_minutes
                 ORDER BY t.wall_time_minutes DESC, t.id
                 LIMIT p_limit) x
         WHERE x.ranks_per_node = 1;
    ELSE
      RETURN QUERY
        SELECT x.workflow_id, x.shape_id
          FROM unnest(p_workflows) AS w (id)
         CROSS JOIN LATERAL (
           SELECT t.workflow_id, t.shape_id, t.ranks_per_node FROM task t
            WHERE t.workflow_id = w.id
              AND t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
              AND t.priority = v_priority AND t.num_nodes = 1
              AND t.wall_time_minutes <= p_minutes
            ORDER BY t.wall_time_minutes DESC, t.id
            LIMIT greatest(p_limit / cardinality(p_workflows), 4)) x
         WHERE x.ranks_per_node = 1;
    END IF;
    GET DIAGNOSTICS v_more = ROW_COUNT;
    v_found := v_found + v_more;
    EXIT WHEN v_found >= p_limit OR v_priority = -2147483648;
    v_priority := v_priority - 1;
  END LOOP;
END $$;

-- claimable_kinds(workflows, minutes): the kinds to choose from: all, or where these are too many to
-- look at each, those of the first thousand tasks and some others by chance, so that what does not
-- fit hides nothing for good.
CREATE OR REPLACE FUNCTION claimable_kinds(p_workflows int[], p_minutes int)
RETURNS TABLE (workflow_id int, shape_id int)
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
DECLARE
  v_workflows int[];
  v_shapes int[];
BEGIN
  SELECT array_agg(k.workflow_id), array_agg(k.shape_id) INTO v_workflows, v_shapes
    FROM list_kinds(p_workflows, 0, 513) k;
  IF cardinality(v_shapes) > 512 THEN
    RETURN QUERY
      SELECT k.workflow_id, k.shape_id FROM leading_kinds(p_workflows, p_minutes, 1000) k
       UNION
      SELECT k.workflow_id, k.shape_id
        FROM list_kinds((SELECT array_agg(w ORDER BY random()) FROM unnest(p_workflows) w),
                        (random() * (SELECT max(s.id) FROM shape s))::int, 64) k;
  ELSE
    RETURN QUERY SELECT * FROM unnest(v_workflows, v_shapes);
  END IF;
END $$;

-- next_priority(workflows, shapes, priority): the first one at or below it among runnable tasks of these
-- kinds.
CREATE OR REPLACE FUNCTION next_priority(p_workflows int[], p_shapes int[], p_priority int)
RETURNS TABLE (priority int)
LANGUAGE plpgsql STABLE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
BEGIN
  IF p_workflows IS NULL THEN
    RETURN QUERY
      SELECT n.priority
        FROM unnest(p_shapes) AS k (shape_id)
       CROSS JOIN LATERAL (
         SELECT t.priority FROM task t
          WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
            AND greatest(t.num_nodes, t.ranks_per_node) = 1
            AND t.shape_id = k.shape_id AND t.priority <= p_priority
          ORDER BY t.priority DESC, t.wall_time_minutes DESC, t.id
          LIMIT 1) n
       ORDER BY n.priority DESC
       LIMIT 1;
  ELSE
    RETURN QUERY
      SELECT n.priority
        FROM unnest(p_workflows, p_shapes) AS k (workflow_id, shape_id)
       CROSS JOIN LATERAL (
         SELECT t.priority FROM task t
          WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
            AND greatest(t.num_nodes, t.ranks_per_node) = 1
            AND t.workflow_id = k.workflow_id
            AND t.shape_id = k.shape_id AND t.priority <= p_priority
          ORDER BY t.priority DESC, t.wall_time_minutes DESC, t.id
          LIMIT 1) n
       ORDER BY n.priority DESC
       LIMIT 1;
  END IF;
END $$;

-- next_fitting_priority(workflows, shapes, priority, minutes): the same, of tasks that still fit the time:
-- may read all those that do not.
CREATE OR REPLACE FUNCTION next_fitting_priority(
  p_workflows int[], p_shapes int[], p_priority int, p_minutes int
) RETURNS TABLE (priority int)
LANGUAGE sql STABLE SET search_path = ensemble, pg_temp AS $$
  SELECT max(n.priority)
    FROM unnest(p_workflows, p_shapes) AS k (workflow_id, shape_id)
   CROSS JOIN LATERAL (
     SELECT t.priority FROM task t
      WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
        AND greatest(t.num_nodes, t.ranks_per_node) = 1
        AND (k.workflow_id IS NULL OR t.workflow_id = k.workflow_id)
        AND t.shape_id = k.shape_id AND t.priority <= p_priority
        AND t.wall_time_minutes <= p_minutes
      ORDER BY t.priority DESC, t.wall_time_minutes DESC, t.id
      LIMIT 1) n
$$;

-- view_serial(workflows, shapes, limits, priority, minutes): the longest runnable tasks of each
-- kind, of one priority, that still fit the time; `place` is the kind's.
CREATE OR REPLACE FUNCTION view_serial(
  p_workflows int[], p_shapes int[], p_limits int[], p_priority int, p_minutes int
) RETURNS TABLE (place int, id bigint, wall_time_minutes int)
LANGUAGE plpgsql STABLE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
BEGIN
  IF p_workflows IS NULL THEN
    RETURN QUERY
      SELECT k.place::int, s.id, s.wall_time_minutes
        FROM unnest(p_shapes, p_limits) WITH ORDINALITY AS k (shape_id, most, place)
       CROSS JOIN LATERAL (
         SELECT t.id, t.wall_time_minutes FROM task t
          WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
            AND greatest(t.num_nodes, t.ranks_per_node) = 1
            AND t.shape_id = k.shape_id AND t.priority = p_priority
            AND t.wall_time_minutes <= p_minutes
          ORDER BY t.wall_time_minutes DESC, t.id
          LIMIT k.most) s
       WHERE k.most > 0
       ORDER BY s.wall_time_minutes DESC, s.id;
  ELSE
    RETURN QUERY
      SELECT k.place::int, s.id, s.wall_time_minutes
        FROM unnest(p_workflows, p_shapes, p_limits)
             WITH ORDINALITY AS k (workflow_id, shape_id, most, place)
       CROSS JOIN LATERAL (
         SELECT t.id, t.wall_time_minutes FROM task t
          WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
            AND greatest(t.num_nodes, t.ranks_per_node) = 1
            AND t.workflow_id = k.workflow_id
            AND t.shape_id = k.shape_id AND t.priority = p_priority
            AND t.wall_time_minutes <= p_minutes
          ORDER BY t.wall_time_minutes DESC, t.id
          LIMIT k.most) s
       WHERE k.most > 0
       ORDER BY s.wall_time_minutes DESC, s.id;
  END IF;
END $$;

-- lock_serial(workflows, shapes, limits, priority, minutes): the same, locked; what somebody else
-- has locked is skipped.
CREATE OR REPLACE FUNCTION lock_serial(
  p_workflows int[], p_shapes int[], p_limits int[], p_priority int, p_minutes int
) RETURNS SETOF bigint
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
BEGIN
  IF p_workflows IS NULL THEN
    RETURN QUERY
      SELECT s.id
        FROM unnest(p_shapes, p_limits) AS k (shape_id, most)
       CROSS JOIN LATERAL (
         SELECT t.id FROM task t
          WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
            AND greatest(t.num_nodes, t.ranks_per_node) = 1
            AND t.shape_id = k.shape_id AND t.priority = p_priority
            AND t.wall_time_minutes <= p_minutes
          ORDER BY t.wall_time_minutes DESC, t.id
          LIMIT k.most
            FOR NO KEY UPDATE SKIP LOCKED) s
       WHERE k.most > 0;
  ELSE
    RETURN QUERY
      SELECT s.id
        FROM unnest(p_workflows, p_shapes, p_limits) AS k (workflow_id, shape_id, most)
       CROSS JOIN LATERAL (
         SELECT t.id FROM task t
          WHERE t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
            AND greatest(t.num_nodes, t.ranks_per_node) = 1
            AND t.workflow_id = k.workflow_id
            AND t.shape_id = k.shape_id AND t.priority = p_priority
            AND t.wall_time_minutes <= p_minutes
          ORDER BY t.wall_time_minutes DESC, t.id
          LIMIT k.most
            FOR NO KEY UPDATE SKIP LOCKED) s
       WHERE k.most > 0;
  END IF;
END $$;

-- claim_serial(lease, workflows, minutes, ahead, limit, slots, free nodes..., whole nodes...): for the
-- free parts of nodes, the best tasks of one rank that fit, and up to `ahead` more that would fit a
-- node with nothing else on it. A task takes 1/greatest(node_packing_count, slots) of its node;
-- that part, as a fraction, its cores, GPUs and memory must be free on one node. How many tasks of
-- one shape fit is exact. Several shapes share what is free by sums over all nodes: which task
-- goes where is the launcher's to say, and it gives back what fragments keep out. The first task
-- taken always has a place, so this cannot go on without progress.
CREATE OR REPLACE FUNCTION claim_serial(
  p_lease bigint, p_workflows int[], p_minutes int, p_ahead int, p_limit int, p_slots int,
  p_nodes int[], p_numerator bigint[], p_denominator bigint[], p_cores int[], p_all_cores int[],
  p_gpus int[], p_memory_mb int[], p_whole_gpus int[], p_whole_memory_mb int[]
) RETURNS SETOF claimed
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
DECLARE
  v_ids bigint[] := '{}';
  v_more bigint[];
  v_left int := p_limit;
  v_ahead int := p_ahead;
  -- By kind: what it is, where in these arrays its shape comes first, and what a task takes.
  v_workflows int[];
  v_shapes int[];
  v_first int[];
  v_fits int[];
  v_parts numeric[];
  v_task_cores int[];
  v_task_gpus int[];
  v_task_mb int[];
  -- What is free, over all nodes.
  v_part numeric;
  v_cores bigint;
  v_gpus bigint;
  v_mb bigint;
  v_quota int[];
  -- Of one priority: no more of a kind than this, and what was free before it.
  v_most int[];
  v_before record;
  v_priority int := 2147483647;
  v_probes int := 0;
  v record;
  i int;
  f int;
BEGIN
  IF NOT is_lease_active(p_lease) THEN
    RAISE EXCEPTION 'lease % is not active', p_lease USING ERRCODE = 'EN001';
  END IF;
  -- A billionth more than there is: a sum of rounded parts must not miss the last one.
  SELECT coalesce(sum(n.nodes * n.numerator::numeric / n.denominator), 0) + 1e-9,
         coalesce(sum(n.nodes::bigint * n.cores), 0), coalesce(sum(n.nodes::bigint * n.gpus), 0),
         CASE WHEN bool_and(n.mb IS NOT NULL) THEN sum(n.nodes::bigint * n.mb) END
    INTO v_part, v_cores, v_gpus, v_mb
    FROM unnest(p_nodes, p_numerator, p_denominator, p_cores, p_gpus, p_memory_mb)
         AS n (nodes, numerator, denominator, cores, gpus, mb);
  SELECT array_agg(x.workflow_id), array_agg(x.shape_id), array_agg(x.place), array_agg(x.fits),
         array_agg(x.part), array_agg(x.cores), array_agg(x.gpus), array_agg(x.mb)
    INTO v_workflows, v_shapes, v_first, v_fits, v_parts, v_task_cores, v_task_gpus, v_task_mb
    FROM (SELECT k.workflow_id, k.shape_id, least(n.fits, 2147483647)::int AS fits,
                 1.0 / m.packing AS part, n.cores, s.gpus_per_rank AS gpus,
                 CASE WHEN v_mb IS NULL THEN 0 ELSE coalesce(s.memory_mb, 0) END AS mb,
                 rank() OVER (ORDER BY k.shape_id)::int AS place
            FROM claimable_kinds(p_workflows, p_minutes) k
            JOIN shape s ON s.id = k.shape_id
           CROSS JOIN LATERAL (
             SELECT greatest(s.node_packing_count, p_slots) AS packing,
                    (s.threads_per_rank - 1) / coalesce(s.threads_per_core, 1) + 1 AS cores) m
           CROSS JOIN LATERAL (
             SELECT coalesce(sum(c.nodes * least(div(c.numerator::numeric * m.packing, c.denominator),
                                                 c.cores / nullif(c.wanted, 0),
                                                 c.gpus / nullif(s.gpus_per_rank, 0),
                                                 c.mb / s.memory_mb)), 0) AS fits,
                    coalesce(min(c.wanted), 0) AS cores
               FROM (SELECT e.*, least(coalesce(m.cores, e.all_cores / m.packing), e.all_cores) AS wanted
                       FROM unnest(p_nodes, p_numerator, p_denominator, p_cores, p_all_cores, p_gpus,
                                   p_memory_mb)
                            AS e (nodes, numerator, denominator, cores, all_cores, gpus, mb)) c) n
           WHERE n.fits > 0
              OR (p_ahead > 0 AND EXISTS (
                    SELECT 1 FROM unnest(p_whole_gpus, p_whole_memory_mb) AS o (gpus, mb)
                     WHERE o.gpus >= s.gpus_per_rank AND coalesce(o.mb >= s.memory_mb, true)))
           ORDER BY k.shape_id) x;
  IF p_workflows IS NULL THEN
    v_workflows := NULL;
  END IF;
  -- No part of a node is smaller than a millionth.
  WHILE v_left > 0 AND v_shapes IS NOT NULL AND v_probes < 250
        AND (v_ahead > 0 OR v_part >= 1e-6) LOOP
    v_probes := v_probes + 1;
    IF v_probes = 200 THEN
      -- So many priorities, and nothing that fits: one walk along the index to what does.
      EXIT WHEN v_ids <> '{}';
      SELECT n.priority INTO v_priority
        FROM next_fitting_priority(v_workflows, v_shapes, v_priority, p_minutes) n;
    ELSE
      SELECT n.priority INTO v_priority FROM next_priority(v_workflows, v_shapes, v_priority) n;
    END IF;
    EXIT WHEN v_priority IS NULL;
    v_most := array_fill(p_limit, ARRAY[cardinality(v_shapes)]);
    SELECT v_left, v_ahead, v_fits, v_part, v_cores, v_gpus, v_mb INTO v_before;
    LOOP
      IF cardinality(v_shapes) = 1 THEN
        v_quota := ARRAY[least(v_fits[1]::bigint + v_ahead, v_left)];
      ELSE
        v_quota := array_fill(0, ARRAY[cardinality(v_shapes)]);
        FOR v IN
          SELECT s.place
            FROM view_serial(v_workflows, v_shapes,
                             ARRAY (SELECT least(v_fits[a.place]::bigint + v_ahead, v_left, a.most)::int
                                      FROM unnest(v_first, v_most) WITH ORDINALITY AS a (place, most, o)
                                     ORDER BY a.o),
                             v_priority, p_minutes) s
        LOOP
          i := v.place;
          f := v_first[i];
          IF v_fits[f] > 0 AND v_parts[i] <= v_part AND v_task_cores[i] <= v_cores
             AND v_task_gpus[i] <= v_gpus AND (v_mb IS NULL OR v_task_mb[i] <= v_mb) THEN
            v_fits[f] := v_fits[f] - 1;
            v_part := v_part - v_parts[i];
            v_cores := v_cores - v_task_cores[i];
            v_gpus := v_gpus - v_task_gpus[i];
            v_mb := v_mb - v_task_mb[i];
          ELSIF v_ahead > 0 THEN
            v_ahead := v_ahead - 1;
          ELSE
            CONTINUE;
          END IF;
          v_quota[i] := v_quota[i] + 1;
          v_left := v_left - 1;
          EXIT WHEN v_left = 0 OR (v_ahead = 0 AND v_part < 1e-6);
        END LOOP;
      END IF;
      SELECT coalesce(array_agg(l), '{}') INTO v_more
        FROM lock_serial(v_workflows, v_shapes, v_quota, v_priority, p_minutes) l;
      EXIT WHEN cardinality(v_shapes) = 1 OR cardinality(v_more) = v_before.v_left - v_left;
      -- Somebody else has locked some that were counted. Share out once more, with no more of their
      -- kinds than there are: these are ours now, so each kind falls short once at most.
      FOR v IN
        SELECT k.place, count(t.id)::int AS tasks
          FROM unnest(v_workflows, v_shapes, v_quota)
               WITH ORDINALITY AS k (workflow_id, shape_id, quota, place)
          LEFT JOIN task t ON t.id = ANY (v_more) AND t.shape_id = k.shape_id
                          AND (k.workflow_id IS NULL OR t.workflow_id = k.workflow_id)
         GROUP BY k.place, k.quota
        HAVING count(t.id) < k.quota
      LOOP
        v_most[v.place] := v.tasks;
      END LOOP;
      EXIT WHEN NOT FOUND;
      v_left := v_before.v_left;
      v_ahead := v_before.v_ahead;
      v_fits := v_before.v_fits;
      v_part := v_before.v_part;
      v_cores := v_before.v_cores;
      v_gpus := v_before.v_gpus;
      v_mb := v_before.v_mb;
    END LOOP;
    v_ids := v_ids || v_more;
    IF cardinality(v_shapes) = 1 THEN
      v_left := v_left - cardinality(v_more);
      v_ahead := v_ahead - greatest(cardinality(v_more) - v_fits[1], 0);
      v_fits[1] := greatest(v_fits[1] - cardinality(v_more), 0);
      EXIT WHEN v_fits[1] + v_ahead = 0;
    END IF;
    EXIT WHEN v_priority = -2147483648;
    v_priority := v_priority - 1;
  END LOOP;
  IF v_ids <> '{}' THEN
    RETURN QUERY SELECT * FROM hand_over(p_lease, v_ids);
  END IF;
END $$;

-- left_alone(workflows, is_serial, nodes, gpus, memory, minutes, limit): of the first so many runnable
-- tasks, how many a launcher with these nodes cannot run, by reason.
CREATE OR REPLACE FUNCTION left_alone(
  p_workflows int[], p_is_serial boolean, p_nodes int, p_gpus int[], p_memory_mb int[],
  p_minutes int, p_limit int
) RETURNS TABLE (reason text, tasks bigint)
LANGUAGE sql STABLE SET search_path = ensemble, pg_temp AS $$
  WITH runnable AS (
    (SELECT t.num_nodes, t.ranks_per_node, t.shape_id, t.wall_time_minutes FROM task t
      WHERE p_workflows IS NULL
        AND t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
      ORDER BY t.priority DESC, t.num_nodes DESC, t.wall_time_minutes DESC, t.id
      LIMIT p_limit)
     UNION ALL
    (SELECT s.*
       FROM unnest(p_workflows) AS w (id)
      CROSS JOIN LATERAL (
        SELECT t.num_nodes, t.ranks_per_node, t.shape_id, t.wall_time_minutes FROM task t
         WHERE t.workflow_id = w.id
           AND t.state IN ('PREPROCESSED', 'RESTART_READY') AND t.lease_id IS NULL
         ORDER BY t.priority DESC, t.num_nodes DESC, t.wall_time_minutes DESC, t.id
         LIMIT p_limit) s
      LIMIT p_limit)
  ), alike AS (
    SELECT num_nodes, ranks_per_node, shape_id, wall_time_minutes > p_minutes AS is_long,
           count(*) AS tasks
      FROM runnable GROUP BY 1, 2, 3, 4
  ), told AS (
    SELECT CASE
             WHEN p_is_serial AND (a.num_nodes > 1 OR a.ranks_per_node > 1) THEN 'ranks'
             WHEN a.num_nodes > p_nodes THEN 'nodes'
             WHEN p_is_serial AND NOT coalesce(n.gpus_per_rank <= (SELECT max(g) FROM unnest(p_gpus) g), true)
               THEN 'gpus'
             WHEN p_is_serial AND p_gpus <> '{}' AND NOT EXISTS (
                    SELECT 1 FROM unnest(p_gpus, p_memory_mb) AS o (gpus, mb)
                     WHERE o.gpus >= n.gpus_per_rank AND coalesce(o.mb >= n.memory_mb, true))
               THEN 'memory'
             WHEN a.is_long THEN 'time'
           END AS reason, a.tasks
      FROM alike a JOIN shape n ON n.id = a.shape_id
  )
  SELECT t.reason, sum(t.tasks)::bigint FROM told t WHERE t.reason IS NOT NULL GROUP BY 1
$$;

-- ------------------------------------------------------------------------------- reports

-- is_retried(task, own_fault): the policies, for a task that was stopped or ended badly.
CREATE OR REPLACE FUNCTION is_retried(p_task task, p_own_fault boolean) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN p_own_fault THEN p_task.failures < p_task.max_retries
              ELSE p_task.auto_timeout_retry AND p_task.timeouts < p_task.max_timeouts END
$$;

-- will_fail(task, outcome, cause): whether such an end of its attempt makes a held task FAILED.
CREATE OR REPLACE FUNCTION will_fail(p_task task, p_outcome text, p_cause text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE
    WHEN p_task.state = 'USER_KILLED' OR p_outcome = 'done' THEN false
    WHEN p_task.state = 'RUN_TIMEOUT'
      THEN NOT is_retried(p_task, p_task.cause IS NOT DISTINCT FROM 'time limit')
    WHEN p_outcome IN ('lost', 'given back')
      THEN p_task.state = 'RUNNING' AND p_task.losses >= p_task.max_losses
    ELSE NOT is_retried(p_task, p_outcome <> 'timeout' OR p_cause IS NOT DISTINCT FROM 'time limit')
  END
$$;

-- settle_tasks(ids): the policies, in the transaction that released the hold.
CREATE OR REPLACE FUNCTION settle_tasks(p_ids bigint[]) RETURNS void
LANGUAGE sql VOLATILE SET search_path = ensemble, pg_temp AS $$
  UPDATE task t
     SET failures = t.failures + CASE WHEN p.own_fault THEN 1 ELSE 0 END,
         timeouts = t.timeouts + CASE WHEN p.own_fault THEN 0 ELSE 1 END,
         state = CASE WHEN is_retried(t, p.own_fault) THEN 'RESTART_READY' ELSE 'FAILED' END
    FROM (SELECT s.id, s.state = 'RUN_ERROR' OR s.cause IS NOT DISTINCT FROM 'time limit' AS own_fault
            FROM task s WHERE s.id = ANY (p_ids)) p
   WHERE t.id = p.id AND t.lease_id IS NULL AND t.state IN ('RUN_ERROR', 'RUN_TIMEOUT')
$$;

-- start_tasks(lease, ...): what has been started is RUNNING. A task that was killed meanwhile keeps
-- its state (verdict applied: the start is on record).
CREATE OR REPLACE FUNCTION start_tasks(
  p_lease bigint, p_id bigint[], p_attempt int[], p_at timestamptz[], p_nodes text[]
) RETURNS TABLE (task_id bigint, attempt int, verdict text)
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
DECLARE
  v_live boolean := is_lease_active(p_lease);
  v_locked bigint[];
BEGIN
  SELECT coalesce(array_agg(l.id), '{}') INTO v_locked FROM (
    SELECT t.id FROM task t WHERE t.id = ANY (p_id) ORDER BY t.id FOR NO KEY UPDATE SKIP LOCKED) l;
  RETURN QUERY
    WITH report AS MATERIALIZED (
      SELECT i.id, i.attempt, i.nodes,
             -- No clock of a launcher makes an attempt begin before its claim, or later than now.
             least(greatest(i.at, a.claimed_at), clock_timestamp()) AS at,
             CASE WHEN a.task_id IS NULL AND t.id IS NULL THEN 'missing'
                  WHEN a.task_id IS NULL OR a.lease_id <> p_lease OR NOT v_live THEN 'fenced'
                  WHEN a.started_at IS NOT NULL OR a.ended_at IS NOT NULL THEN 'duplicate'
                  WHEN NOT i.id = ANY (v_locked) THEN 'busy'
                  ELSE 'applied' END AS verdict
        FROM unnest(p_id, p_attempt, p_at, p_nodes) AS i (id, attempt, at, nodes)
        LEFT JOIN ensemble.attempt a ON a.task_id = i.id AND a.attempt = i.attempt
        LEFT JOIN task t ON t.id = i.id
    ), begun AS (
      UPDATE ensemble.attempt a SET started_at = r.at, nodes = string_to_array(r.nodes, ',')
        FROM report r
       WHERE r.verdict = 'applied' AND a.task_id = r.id AND a.attempt = r.attempt
    ), moved AS (
      UPDATE task t SET started_at = r.at, ended_at = NULL, exit_code = NULL,
             state = CASE WHEN t.state IN ('PREPROCESSED', 'RESTART_READY') THEN 'RUNNING'
                          ELSE t.state END
        FROM report r
       WHERE r.verdict = 'applied' AND t.id = r.id
    )
    SELECT r.id, r.attempt, r.verdict FROM report r;
END $$;

-- blocked_parents(done, dead): locks whatever the end of these tasks will change below them, and
-- returns those of them for which that is not to be had within a moment: somebody's open
-- transaction holds a child. A launcher reports such a task again and is not stalled by it.
CREATE OR REPLACE FUNCTION blocked_parents(p_done bigint[], p_dead bigint[]) RETURNS bigint[]
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp SET enable_seqscan = off
SET lock_timeout = '250ms' AS $$
DECLARE
  v_below bigint[];
  v_got bigint[];
  v_missed bigint[];
BEGIN
  IF NOT has_children(p_done || p_dead) THEN
    RETURN '{}';
  END IF;
  WITH RECURSIVE down (id) AS (
    SELECT child_id FROM task_parent WHERE parent_id = ANY (p_dead) AND waits
    UNION
    SELECT e.child_id
      FROM down d
      JOIN task c ON c.id = d.id AND c.state = 'AWAITING_PARENTS'
      JOIN task_parent e ON e.parent_id = d.id AND e.waits
  )
  SELECT array_agg(id) INTO v_below FROM (
    SELECT id FROM down
     UNION
    SELECT child_id FROM task_parent WHERE parent_id = ANY (p_done) AND waits) b;
  IF v_below IS NULL THEN
    RETURN '{}';
  END IF;
  SELECT array_agg(l.id) INTO v_got FROM (
    SELECT t.id FROM task t WHERE t.id = ANY (v_below) ORDER BY t.id
       FOR NO KEY UPDATE SKIP LOCKED) l;
  SELECT array_agg(x.id) INTO v_missed FROM (
    SELECT t.id FROM task t WHERE t.id = ANY (v_below) EXCEPT SELECT unnest(v_got)) x;
  IF v_missed IS NULL THEN
    RETURN '{}';
  END IF;
  BEGIN
    PERFORM 1 FROM task t WHERE t.id = ANY (v_missed) ORDER BY t.id FOR NO KEY UPDATE;
    RETURN '{}';
  EXCEPTION WHEN lock_not_available THEN
    NULL;
  END;
  RETURN (
    WITH RECURSIVE up (id) AS (
      SELECT parent_id FROM task_parent WHERE child_id = ANY (v_missed) AND waits
      UNION
      SELECT e.parent_id FROM up u JOIN task_parent e ON e.child_id = u.id AND e.waits
    )
    SELECT coalesce(array_agg(id), '{}') FROM up WHERE id = ANY (p_done || p_dead));
END $$;

-- finish_tasks(lease, ...): nothing of these attempts runs any more. Fenced on the attempt row, so
-- it always closes the attempt and releases the hold; moves the state only from where its launcher
-- had it: claimed, RUNNING, or RUN_TIMEOUT that ended well after all.
CREATE OR REPLACE FUNCTION finish_tasks(
  p_lease bigint, p_id bigint[], p_attempt int[], p_outcome text[], p_at timestamptz[],
  p_started timestamptz[], p_nodes text[], p_exit int[], p_cause text[], p_reason text[],
  p_error text[], p_output text[]
) RETURNS TABLE (task_id bigint, attempt int, verdict text)
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
DECLARE
  v_live boolean := is_lease_active(p_lease);
  v_now timestamptz;
  v_locked bigint[];
  v_blocked bigint[];
  v_unsettled bigint[];
  v_verdicts text[];
  v_ids bigint[];
  v_attempts int[];
BEGIN
  SELECT coalesce(array_agg(l.id), '{}') INTO v_locked FROM (
    SELECT t.id FROM task t WHERE t.id = ANY (p_id) ORDER BY t.id FOR NO KEY UPDATE SKIP LOCKED) l;
  SELECT blocked_parents(array_agg(t.id) FILTER (WHERE i.outcome = 'done' AND t.state <> 'USER_KILLED'),
                         array_agg(t.id) FILTER (WHERE will_fail(t, i.outcome, i.cause)))
    INTO v_blocked
    FROM unnest(p_id, p_outcome, p_cause) AS i (id, outcome, cause)
    JOIN task t ON t.id = i.id AND t.lease_id = p_lease;
  IF v_blocked <> '{}' THEN
    v_locked := ARRAY (SELECT unnest(v_locked) EXCEPT SELECT unnest(v_blocked));
  END IF;
  v_now := clock_timestamp();
  WITH report AS MATERIALIZED (
    SELECT i.id, i.attempt, i.nodes,
           -- What is on record as started was not given back unstarted: it is lost.
           CASE WHEN k.is_lost THEN 'lost' ELSE i.outcome END AS outcome,
           -- No clock of a launcher makes an attempt begin before its claim or outlive its hold.
           CASE WHEN i.at IS NULL THEN v_now
                ELSE least(greatest(i.at, i.started, a.started_at, a.claimed_at), v_now) END AS at,
           CASE WHEN a.started_at IS NOT NULL THEN a.started_at
                WHEN i.started IS NOT NULL THEN least(greatest(i.started, a.claimed_at), v_now)
                END AS started,
           i.code, CASE WHEN k.is_lost THEN 'launcher lost' ELSE i.cause END AS cause,
           CASE WHEN k.is_lost THEN coalesce(i.reason, 'given back after its start') ELSE i.reason END AS reason,
           i.error, i.output, t.state AS was,
           CASE WHEN a.task_id IS NULL AND t.id IS NULL THEN 'missing'
                WHEN a.task_id IS NULL OR a.lease_id <> p_lease THEN 'fenced'
                WHEN a.ended_at IS NOT NULL THEN
                  CASE WHEN a.outcome = 'lost' AND NOT v_live THEN 'fenced' ELSE 'duplicate' END
                WHEN NOT v_live THEN 'fenced'
                WHEN NOT i.id = ANY (v_locked) THEN 'busy'
                ELSE 'applied' END AS verdict
      FROM unnest(p_id, p_attempt, p_outcome, p_at, p_started, p_nodes, p_exit, p_cause, p_reason,
                  p_error, p_output)
           AS i (id, attempt, outcome, at, started, nodes, code, cause, reason, error, output)
      LEFT JOIN ensemble.attempt a ON a.task_id = i.id AND a.attempt = i.attempt
      LEFT JOIN task t ON t.id = i.id
     CROSS JOIN LATERAL (
       SELECT i.outcome = 'given back' AND (t.state = 'RUNNING' OR a.started_at IS NOT NULL) AS is_lost) k
  ), closed AS (
    UPDATE ensemble.attempt a
       SET ended_at = r.at, started_at = r.started,
           nodes = CASE WHEN r.nodes = '' THEN a.nodes ELSE string_to_array(r.nodes, ',') END,
           exit_code = r.code, error = r.error, output = r.output,
           outcome = CASE WHEN r.was = 'USER_KILLED' AND r.outcome <> 'given back' THEN 'killed'
                          ELSE r.outcome END,
           cause = CASE WHEN r.was = 'USER_KILLED' THEN 'killed by user' ELSE r.cause END,
           reason = r.reason
      FROM report r
     WHERE r.verdict = 'applied' AND a.task_id = r.id AND a.attempt = r.attempt
  ), moved AS (
    UPDATE task t
       SET lease_id = NULL,
           started_at = coalesce(r.started, t.started_at),
           ended_at = CASE WHEN r.outcome = 'given back' AND t.state <> 'USER_KILLED'
                           THEN t.ended_at ELSE r.at END,
           exit_code = CASE WHEN r.outcome = 'given back' THEN t.exit_code ELSE r.code END,
           cause = CASE
             WHEN t.state = 'USER_KILLED' THEN coalesce(t.cause, 'killed by user')
             WHEN r.outcome = 'done' THEN NULL
             WHEN r.outcome = 'given back' OR t.state = 'RUN_TIMEOUT' THEN t.cause
             ELSE r.cause END,
           reason = CASE
             WHEN r.outcome = 'done' AND t.state <> 'USER_KILLED' THEN NULL
             WHEN t.state IN ('USER_KILLED', 'RUN_TIMEOUT') OR r.outcome = 'given back' THEN t.reason
             ELSE r.reason END,
           losses = t.losses + CASE WHEN r.outcome = 'lost' AND t.state = 'RUNNING' THEN 1 ELSE 0 END,
           state = CASE
             WHEN t.state = 'USER_KILLED' OR r.outcome = 'given back' THEN t.state
             WHEN r.outcome = 'done' THEN 'JOB_FINISHED'
             WHEN t.state = 'RUN_TIMEOUT' OR r.outcome = 'timeout' THEN 'RUN_TIMEOUT'
             WHEN r.outcome = 'lost' AND t.state <> 'RUNNING' THEN t.state
             WHEN r.outcome = 'lost' AND t.losses < t.max_losses THEN 'RESTART_READY'
             WHEN r.outcome = 'lost' THEN 'FAILED'
             ELSE 'RUN_ERROR' END
      FROM report r
     WHERE r.verdict = 'applied' AND t.id = r.id
    RETURNING t.id, t.state
  )
  SELECT (SELECT array_agg(m.id) FROM moved m WHERE m.state IN ('RUN_ERROR', 'RUN_TIMEOUT')),
         array_agg(r.id), array_agg(r.attempt), array_agg(r.verdict)
    INTO v_unsettled, v_ids, v_attempts, v_verdicts
    FROM report r;
  IF v_unsettled IS NOT NULL THEN
    PERFORM settle_tasks(v_unsettled);
  END IF;
  RETURN QUERY SELECT * FROM unnest(v_ids, v_attempts, v_verdicts);
END $$;

-- release_lost(lease, limit, after): gives back what a closed lease still held, of the ids above one;
-- the last step of a reaping. Returns how many were released, and the id to go on after: null where
-- that was all. A closed lease cannot gain a task, so 0 held is final.
DROP FUNCTION IF EXISTS release_lost(bigint, int);
CREATE OR REPLACE FUNCTION release_lost(
  p_lease bigint, p_limit int, p_after bigint, OUT released int, OUT last_id bigint
)
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
DECLARE
  v_evidence text;
  v_ids bigint[];
BEGIN
  released := 0;
  SELECT evidence INTO v_evidence FROM lease WHERE id = p_lease AND state <> 'ACTIVE' FOR KEY SHARE;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  SELECT coalesce(array_agg(l.id), '{}'), CASE WHEN count(*) = p_limit THEN max(l.id) END
    INTO v_ids, last_id FROM (
    SELECT t.id FROM task t WHERE t.lease_id = p_lease AND t.id > p_after
     ORDER BY t.id LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED) l;
  v_ids := ARRAY (
    SELECT unnest(v_ids)
    EXCEPT
    SELECT unnest(blocked_parents('{}', ARRAY (
      SELECT t.id FROM task t WHERE t.id = ANY (v_ids) AND will_fail(t, 'lost', NULL)))));
  UPDATE attempt a
     SET ended_at = clock_timestamp(), reason = v_evidence,
         outcome = CASE WHEN t.state = 'USER_KILLED' THEN 'killed' ELSE 'lost' END,
         cause = CASE WHEN t.state = 'USER_KILLED' THEN 'killed by user' ELSE 'launcher lost' END
    FROM task t
   WHERE t.id = ANY (v_ids) AND a.task_id = t.id AND a.attempt = t.attempt AND a.ended_at IS NULL;
  UPDATE task t
     SET lease_id = NULL,
         losses = t.losses + CASE WHEN t.state = 'RUNNING' THEN 1 ELSE 0 END,
         ended_at = CASE WHEN t.state IN ('PREPROCESSED', 'RESTART_READY') THEN t.ended_at
                         ELSE clock_timestamp() END,
         cause = CASE WHEN t.state = 'RUNNING' THEN 'launcher lost' ELSE t.cause END,
         reason = CASE WHEN t.state = 'RUNNING' THEN v_evidence ELSE t.reason END,
         state = CASE WHEN t.state <> 'RUNNING' THEN t.state
                      WHEN t.losses < t.max_losses THEN 'RESTART_READY'
                      ELSE 'FAILED' END
   WHERE t.id = ANY (v_ids);
  PERFORM settle_tasks(v_ids);
  UPDATE lease l SET swept = true
   WHERE l.id = p_lease AND NOT EXISTS (SELECT 1 FROM task t WHERE t.lease_id = p_lease);
  released := cardinality(v_ids);
END $$;

-- drain_tasks(lease, reason): the allocation ends: one statement marks all that runs. A row that
-- somebody's open transaction has locked is skipped; its end report says the same.
CREATE OR REPLACE FUNCTION drain_tasks(p_lease bigint, p_reason text) RETURNS int
LANGUAGE sql VOLATILE SET search_path = ensemble, pg_temp AS $$
  WITH live AS MATERIALIZED (
    SELECT id FROM lease WHERE id = p_lease AND state = 'ACTIVE' FOR KEY SHARE
  ), locked AS MATERIALIZED (
    SELECT t.id FROM task t
     WHERE t.lease_id = p_lease AND t.state = 'RUNNING' AND EXISTS (SELECT 1 FROM live)
     ORDER BY t.id FOR NO KEY UPDATE OF t SKIP LOCKED
  ), marked AS (
    UPDATE task t SET state = 'RUN_TIMEOUT', cause = 'allocation ended', reason = p_reason
      FROM locked l WHERE t.id = l.id AND t.lease_id = p_lease AND t.state = 'RUNNING'
    RETURNING 1
  )
  SELECT count(*)::int FROM marked
$$;

-- time_out_tasks(lease, ids, attempts): past their own limit; marked while they are being ended.
CREATE OR REPLACE FUNCTION time_out_tasks(p_lease bigint, p_id bigint[], p_attempt int[])
RETURNS int
LANGUAGE sql VOLATILE SET search_path = ensemble, pg_temp AS $$
  WITH live AS MATERIALIZED (
    SELECT id FROM lease WHERE id = p_lease AND state = 'ACTIVE' FOR KEY SHARE
  ), locked AS MATERIALIZED (
    SELECT t.id FROM task t JOIN unnest(p_id, p_attempt) AS i (id, attempt)
        ON i.id = t.id AND i.attempt = t.attempt
     WHERE t.lease_id = p_lease AND t.state = 'RUNNING' AND EXISTS (SELECT 1 FROM live)
     ORDER BY t.id FOR NO KEY UPDATE OF t SKIP LOCKED
  ), marked AS (
    UPDATE task t SET state = 'RUN_TIMEOUT', cause = 'time limit', reason = NULL
      FROM locked l WHERE t.id = l.id AND t.lease_id = p_lease AND t.state = 'RUNNING'
    RETURNING 1
  )
  SELECT count(*)::int FROM marked
$$;

-- ------------------------------------------------------------------------------- users

-- kill_tasks(ids, reason): what has not ended is USER_KILLED; the trigger rings the launchers.
CREATE OR REPLACE FUNCTION kill_tasks(p_ids bigint[], p_reason text)
RETURNS TABLE (id bigint, was_held boolean)
LANGUAGE sql VOLATILE SET search_path = ensemble, pg_temp AS $$
  WITH locked AS MATERIALIZED (
    SELECT t.id FROM task t
     WHERE t.id = ANY (p_ids) AND t.state NOT IN ('JOB_FINISHED', 'FAILED', 'USER_KILLED')
     ORDER BY t.id FOR NO KEY UPDATE
  )
  UPDATE task t
     SET state = 'USER_KILLED', cause = 'killed by user', reason = p_reason,
         ended_at = CASE WHEN t.lease_id IS NULL THEN clock_timestamp() ELSE t.ended_at END
    FROM locked l
   WHERE t.id = l.id AND t.state NOT IN ('JOB_FINISHED', 'FAILED', 'USER_KILLED')
  RETURNING t.id, t.lease_id IS NOT NULL
$$;

-- retry_tasks(ids): FAILED and USER_KILLED tasks that are not held run again, and with them what
-- had failed only because of them. Counters start afresh; attempt goes on rising. What waits for a
-- task that stays dead stays dead too. Parents are kept from moving until commit: one that failed
-- meanwhile would not find the child that is being revived.
CREATE OR REPLACE FUNCTION retry_tasks(p_ids bigint[]) RETURNS TABLE (id bigint)
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
DECLARE
  v_wanted bigint[];
  v_locked bigint[];
BEGIN
  -- Until there are no more: what was being added below one of them, and made its lock wait, is seen
  -- only then.
  LOOP
    WITH RECURSIVE wanted (id) AS (
      SELECT t.id FROM task t WHERE t.id = ANY (p_ids) AND t.state IN ('FAILED', 'USER_KILLED')
      UNION
      SELECT c.id FROM wanted w
        JOIN task_parent e ON e.parent_id = w.id AND e.waits
        JOIN task c ON c.id = e.child_id AND c.state = 'FAILED' AND c.cause = 'parent'
    )
    SELECT array_agg(w.id) INTO v_wanted FROM wanted w;
    EXIT WHEN NOT EXISTS (SELECT unnest(v_wanted) EXCEPT SELECT unnest(v_locked));
    PERFORM 1 FROM task t
      WHERE t.id IN (SELECT unnest(v_wanted) UNION
                     SELECT e.parent_id FROM task_parent e WHERE e.child_id = ANY (v_wanted) AND e.waits)
      ORDER BY t.id FOR NO KEY UPDATE;
    v_locked := v_locked || v_wanted;
  END LOOP;
  RETURN QUERY
    WITH RECURSIVE wanted AS MATERIALIZED (
      SELECT w.id FROM unnest(v_wanted) AS w (id)
    ), stays (id) AS (
      SELECT t.id FROM wanted w JOIN task t ON t.id = w.id
       WHERE t.state NOT IN ('FAILED', 'USER_KILLED') OR t.lease_id IS NOT NULL
          OR EXISTS (
            SELECT 1 FROM task_parent e JOIN task p ON p.id = e.parent_id
             WHERE e.child_id = t.id AND e.waits AND p.state IN ('FAILED', 'USER_KILLED')
               AND NOT EXISTS (SELECT 1 FROM wanted o WHERE o.id = p.id))
      UNION
      SELECT e.child_id
        FROM stays s
        JOIN task p ON p.id = s.id AND p.state IN ('FAILED', 'USER_KILLED')
        JOIN task_parent e ON e.parent_id = s.id AND e.waits
        JOIN wanted w ON w.id = e.child_id
    )
    UPDATE task t
       SET state = CASE WHEN t.pending_parents > 0 THEN 'AWAITING_PARENTS' ELSE 'PREPROCESSED' END,
           failures = 0, timeouts = 0, losses = 0, cause = NULL, reason = NULL, exit_code = NULL,
           started_at = NULL, ended_at = NULL
      FROM wanted w
     WHERE t.id = w.id AND NOT EXISTS (SELECT 1 FROM stays s WHERE s.id = w.id)
    RETURNING t.id;
END $$;

-- remove_tasks(ids): what is held stays; so does what something waits for that is not removed too.
CREATE OR REPLACE FUNCTION remove_tasks(p_ids bigint[]) RETURNS TABLE (id bigint)
LANGUAGE plpgsql VOLATILE SET search_path = ensemble, pg_temp AS $$
#variable_conflict use_column
DECLARE
  v_locked bigint[];
BEGIN
  -- A statement of its own: a child that was being added to one of them is seen by the next.
  SELECT array_agg(l.id) INTO v_locked FROM (
    SELECT t.id FROM task t WHERE t.id = ANY (p_ids) AND t.lease_id IS NULL
     ORDER BY t.id FOR UPDATE) l;
  RETURN QUERY
    WITH RECURSIVE wanted AS MATERIALIZED (
      SELECT w.id FROM unnest(v_locked) AS w (id)
    ), link AS MATERIALIZED (
      SELECT e.parent_id, e.child_id
        FROM wanted w
        JOIN task p ON p.id = w.id
        JOIN task_parent e ON e.parent_id = w.id AND e.waits
        JOIN task c ON c.id = e.child_id
       WHERE is_waited_for(p.state, c.state, c.pending_parents)
    ), stays (id) AS (
      SELECT k.parent_id FROM link k
       WHERE NOT EXISTS (SELECT 1 FROM wanted w WHERE w.id = k.child_id)
      UNION
      SELECT k.parent_id FROM stays s JOIN link k ON k.child_id = s.id
    )
    DELETE FROM task t USING wanted w
     WHERE t.id = w.id AND NOT EXISTS (SELECT 1 FROM stays s WHERE s.id = w.id)
    RETURNING t.id;
END $$;

-- ------------------------------------------------------------------------------- rights

-- The site's own cluster has a role for launchers and users and one for the API inside tasks.
-- An external database may have neither: then its one user owns everything.
DO $$
DECLARE
  v_role text;
BEGIN
  FOREACH v_role IN ARRAY ARRAY['ensemble_user', 'ensemble_task'] LOOP
    IF EXISTS (SELECT 1 FROM pg_roles WHERE rolname = v_role) THEN
      EXECUTE format('GRANT USAGE ON SCHEMA ensemble TO %I', v_role);
      EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA ensemble TO %I', v_role);
      EXECUTE format('REVOKE INSERT, UPDATE, DELETE ON move, schema_version, schema_script, event FROM %I', v_role);
      EXECUTE format('REVOKE INSERT, DELETE ON service FROM %I', v_role);
      EXECUTE format('GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA ensemble TO %I', v_role);
    END IF;
  END LOOP;
END $$;
