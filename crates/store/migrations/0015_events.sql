-- What happened to a team's things, for those who listen. Triggers write it, so that no way to change a state is forgotten, and the program
-- before this one tells it as well.

-- Who wished it, and why, where that needs a word. None: nobody but the platform.
alter table operations add column actor_kind text;
alter table operations add column actor_id text;
alter table operations add column cause text;

-- As it was written: ids come in the order of the writing, and that is not the order in which transactions end.
create table events_written (
    id bigint generated always as identity primary key,
    at timestamptz not null default now(),
    team_id uuid not null,
    kind text not null,
    outcome text,
    resource_type text not null,
    resource_id text not null,
    actor_kind text,
    actor_id text,
    metadata jsonb not null default '{}',
    error text,
    details jsonb not null default '{}'
);

-- As it is read. One transaction at a time moves what others have written in here and numbers it: whoever sees a number sees all smaller
-- ones.
create table events (
    id bigint generated always as identity primary key,
    at timestamptz not null,
    team_id uuid not null,
    kind text not null,
    outcome text,
    resource_type text not null,
    resource_id text not null,
    actor_kind text,
    actor_id text,
    metadata jsonb not null,
    error text,
    details jsonb not null
);
create index events_team on events (team_id, id);

-- `Status::of` of the model.
create function sandbox_status(desired text, observed text) returns text language sql immutable as $$
    select case
        when observed = 'killed' then 'stopped'
        when desired = 'killed' or observed = 'killing' then 'stopping'
        when observed = 'failed' then 'error'
        when observed = 'lost' then 'missing'
        when observed = 'pausing' or desired = 'paused' and observed = 'running' then 'pausing'
        when observed = 'resuming' or desired = 'running' and observed = 'paused' then 'resuming'
        else observed
    end
$$;

create function tell_of_sandbox() returns trigger language plpgsql as $$
declare
    was text;
    now_is text := sandbox_status(new.desired, new.observed);
    wished record;
begin
    if tg_op = 'UPDATE' then
        was := sandbox_status(old.desired, old.observed);
        if was = now_is then
            return null;
        end if;
    end if;
    insert into events_written (team_id, kind, resource_type, resource_id, metadata)
    values (new.team_id, 'capsule.state.changed', 'capsule', new.id,
        jsonb_strip_nulls(jsonb_build_object('from', was, 'to', now_is,
            'reason', case new.reason when 'deadline' then 'ttl_expired' when 'requested' then null else left(new.reason, 256) end)));
    if now_is = 'stopped' then
        select o.actor_kind, o.actor_id, o.cause, o.id, o.attempts into wished
        from operations o where o.sandbox_id = new.id and o.kind = 'kill' order by o.created_at desc limit 1;
        insert into events_written (team_id, kind, outcome, resource_type, resource_id, actor_kind, actor_id, metadata)
        values (new.team_id, 'capsule.destroy', 'success', 'capsule', new.id, coalesce(wished.actor_kind, 'platform'), coalesce(wished.actor_id, ''),
            jsonb_strip_nulls(jsonb_build_object('reason', coalesce(wished.cause, case new.reason when 'host_removed' then 'host_failure' end))));
    end if;
    return null;
end
$$;
create trigger sandboxes_tell after insert or update of desired, observed on sandboxes
    for each row execute function tell_of_sandbox();

create function tell_of_operation() returns trigger language plpgsql as $$
declare
    team uuid;
    is_of_template boolean := new.kind = 'snapshot';
    resource text := new.sandbox_id;
begin
    select s.team_id into team from sandboxes s where s.id = new.sandbox_id;
    if is_of_template then
        select s.name into resource from snapshots s where s.id = new.snapshot_id;
        if resource is null then
            return null;
        end if;
    end if;
    insert into events_written (team_id, kind, outcome, resource_type, resource_id, actor_kind, actor_id, metadata, error, details)
    values (team,
        case when new.phase = 'open' then 'snapshot.began'
            else case new.kind when 'run' then 'capsule.create' when 'pause' then 'capsule.pause' when 'resume' then 'capsule.resume'
                when 'kill' then 'capsule.destroy' else 'template.snapshot.create' end end,
        case new.phase when 'done' then 'success' when 'failed' then 'error' end,
        case when is_of_template then 'template' else 'capsule' end,
        resource,
        coalesce(new.actor_kind, 'platform'),
        coalesce(new.actor_id, ''),
        jsonb_strip_nulls(jsonb_build_object('reason', new.cause, 'sandbox_id', case when is_of_template then new.sandbox_id end)),
        case when new.phase = 'failed' then coalesce(left(new.error_message, 1024), 'failed') end,
        jsonb_strip_nulls(jsonb_build_object('operation', new.id, 'attempts', new.attempts, 'code', new.error_code,
            'steps', case when new.phase <> 'open' then new.steps end,
            'ms', case when new.phase <> 'open' then round(extract(epoch from new.finished_at - new.created_at) * 1000, 1) end)));
    return null;
end
$$;
-- That a sandbox has ended is told by the sandbox.
create trigger operations_tell after update of phase on operations
    for each row when (old.phase = 'open' and (new.phase = 'done' and new.kind in ('run', 'pause', 'resume', 'snapshot')
        or new.phase = 'failed' and new.kind in ('run', 'pause', 'resume', 'snapshot', 'kill')))
    execute function tell_of_operation();
create trigger operations_tell_begin after insert on operations
    for each row when (new.kind = 'snapshot' and new.phase = 'open') execute function tell_of_operation();
