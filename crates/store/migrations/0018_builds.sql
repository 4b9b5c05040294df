-- A template's environment, which what begins with it has.
alter table snapshots add column envs jsonb not null default '{}';
-- All teams can begin with it, not only its own, which is the platform's. What it is of ends when it is there.
alter table snapshots add column is_published boolean not null default false;
-- The name that a new one takes from another when it is there; until then its own is one that nobody can give.
alter table snapshots add column becomes text;
create index snapshots_published on snapshots (name) where is_published and state = 'ready';
create index snapshots_becoming on snapshots (becomes) where becomes is not null;

-- Makings of templates of the platform, by recipes.
create table builds (
    id uuid primary key,
    name text not null,
    base_template text not null,
    recipe jsonb not null,
    healthcheck text,
    vcpus integer not null,
    memory_mib integer not null,
    disk_mib integer not null,
    skip_pre_post boolean not null,
    archive_id uuid,
    -- gzip, tar, zip
    archive_kind text,
    state text not null default 'pending' check (state in ('pending', 'running', 'success', 'failed', 'cancelled')),
    total_steps integer not null,
    default_user text not null default 'root',
    default_env jsonb not null default '{}',
    error text,
    -- Where it is made. No reference: how it went is known for longer.
    sandbox_id text,
    -- What comes of it, once the recipe is through.
    snapshot_id uuid,
    -- How often it was begun.
    attempts integer not null default 0,
    -- Whoever works on it says so again before that.
    lease_until timestamptz,
    created_at timestamptz not null default now(),
    started_at timestamptz,
    completed_at timestamptz
);
create index builds_unfinished on builds (created_at) where state in ('pending', 'running');
create index builds_newest on builds (created_at desc, id desc);
create index builds_snapshot on builds (snapshot_id) where snapshot_id is not null and state = 'running';

create table build_steps (
    build_id uuid not null references builds on delete cascade,
    step integer not null,
    phase text not null,
    cmd text not null,
    stdout text not null,
    stderr text not null,
    exit integer not null,
    elapsed_ms bigint not null,
    primary key (build_id, step)
);

-- Files for COPY, in pieces, from before their build is there until it has ended.
create table build_archives (
    id uuid not null,
    part integer not null,
    bytes bytea not null,
    created_at timestamptz not null default now(),
    primary key (id, part)
);
-- They are compressed already.
alter table build_archives alter column bytes set storage external;

-- As 0015 has it, but for a template that is being made: it is told of by the name that it will have.
create or replace function tell_of_operation() returns trigger language plpgsql as $$
declare
    team uuid;
    is_of_template boolean := new.kind = 'snapshot';
    resource text := new.sandbox_id;
begin
    select s.team_id into team from sandboxes s where s.id = new.sandbox_id;
    if is_of_template then
        select coalesce(s.becomes, s.name) into resource from snapshots s where s.id = new.snapshot_id;
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
