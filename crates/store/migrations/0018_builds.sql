-- A template's environment, which what begins with it has.
alter table snapshots add column envs jsonb not null default '{}';
-- All teams can begin with it, not only its own, which is the platform's.
alter table snapshots add column is_published boolean not null default false;
-- The name that a new one takes from another when it is there; until then its own is one that nobody can give.
alter table snapshots add column becomes text;
-- What it is of ends with its making: it was there for that alone.
alter table snapshots add column ends_source boolean not null default false;
-- A name may be another team's, and that of one that is published goes for all of them.
create index snapshots_ready on snapshots (name) where name is not null and state = 'ready';

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
