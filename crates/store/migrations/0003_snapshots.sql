-- Saved states that sandboxes begin with. One that has a name is a template of its team. One that has none is a fork's, and goes as soon
-- as all that were to begin with it have begun.
create table snapshots (
    id uuid primary key,
    team_id uuid not null references teams (id),
    name text,
    -- What it is of; that may be gone for long.
    sandbox_id text not null,
    -- It lies there, and what begins with it begins there.
    host_id uuid not null references hosts (id) on delete cascade,
    template text not null,
    vcpus integer not null,
    memory_mib integer not null,
    disk_mib integer not null,
    default_user text not null,
    state text not null default 'making' check (state in ('making', 'ready', 'removing')),
    size_bytes bigint not null default 0,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
create unique index snapshots_name on snapshots (team_id, name) where name is not null and state <> 'removing';
create index snapshots_host on snapshots (host_id);

-- No reference: a sandbox outlives what it began with.
alter table sandboxes add column snapshot_id uuid;
create index sandboxes_beginning on sandboxes (snapshot_id) where snapshot_id is not null and observed = 'starting';
create index sandboxes_snapshot on sandboxes (snapshot_id) where snapshot_id is not null;

-- No reference: how it went is known for longer than what it made.
alter table operations add column snapshot_id uuid;
create index operations_snapshot on operations (snapshot_id) where snapshot_id is not null;
alter table operations drop constraint operations_kind_check;
alter table operations add constraint operations_kind_check
    check (kind in ('run', 'pause', 'resume', 'kill', 'clean', 'snapshot'));
