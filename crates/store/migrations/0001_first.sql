-- The nouns of the platform. Migrations only go forward: expand, move, contract.

create table teams (
    id uuid primary key,
    name text not null,
    is_platform boolean not null default false,
    created_at timestamptz not null default now()
);
-- One team owns what belongs to the platform itself.
create unique index teams_one_platform on teams (is_platform) where is_platform;

create table users (
    id uuid primary key,
    email text not null,
    name text not null,
    password_hash text,
    is_admin boolean not null default false,
    status text not null default 'active' check (status in ('active', 'disabled')),
    created_at timestamptz not null default now()
);
create unique index users_email on users (lower(email));

create table team_members (
    team_id uuid not null references teams (id) on delete cascade,
    user_id uuid not null references users (id) on delete cascade,
    role text not null check (role in ('owner', 'admin', 'member')),
    created_at timestamptz not null default now(),
    primary key (team_id, user_id)
);
create index team_members_user on team_members (user_id);

create table api_keys (
    id uuid primary key,
    team_id uuid not null references teams (id) on delete cascade,
    name text not null,
    -- SHA-256 of the 32 random bytes, which both spellings of a key share.
    key_hash bytea not null unique,
    key_prefix text not null,
    created_by uuid references users (id) on delete set null,
    created_at timestamptz not null default now(),
    last_used timestamptz
);
create index api_keys_team on api_keys (team_id, created_at);

create table hosts (
    id uuid primary key,
    kind text not null check (kind in ('regular')),
    provider text,
    availability_zone text,
    state text not null default 'pending' check (state in ('pending', 'active', 'draining')),
    -- Grows when the host is declared lost, so that calls and reports of before are refused.
    epoch bigint not null default 1,
    address text,
    arch text,
    cpu_cores bigint,
    memory_mb bigint,
    disk_gb bigint,
    isolation text,
    agent_version text,
    templates text[] not null default '{}',
    memory_free_mb bigint,
    disk_free_mb bigint,
    -- The last heartbeat: of which process of the agent, and which of its heartbeats.
    agent_run text not null default '',
    heartbeat_sequence bigint not null default 0,
    last_heartbeat_at timestamptz,
    -- Sandboxes that the host reports and no row claims: left alone, and shown to operators.
    unclaimed text[] not null default '{}',
    created_by text not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
create index hosts_created on hosts (created_at);

create table registration_tokens (
    token_hash bytea primary key,
    host_id uuid not null references hosts (id) on delete cascade,
    expires_at timestamptz not null,
    used_at timestamptz,
    -- SHA-256 of the public key that used it: the same key may ask again, because the first answer may have been lost.
    used_by_key bytea,
    created_at timestamptz not null default now()
);
create index registration_tokens_host on registration_tokens (host_id);

create table sandboxes (
    id text primary key,
    team_id uuid not null references teams (id),
    template text not null,
    vcpus integer not null,
    memory_mib integer not null,
    disk_mib integer not null,
    envs jsonb not null default '{}',
    metadata jsonb not null default '{}',
    default_user text not null default '',
    timeout_sec bigint not null default 0,
    -- The instant at which the sandbox is killed.
    deadline timestamptz,
    desired text not null check (desired in ('running', 'paused', 'killed')),
    -- Grows with each wish.
    revision bigint not null default 1,
    observed text not null check (observed in
        ('starting', 'running', 'pausing', 'paused', 'resuming', 'killing', 'killed', 'failed', 'lost')),
    reason text,
    incarnation text,
    host_id uuid references hosts (id),
    host_epoch bigint,
    isolation text,
    versions jsonb not null default '{}',
    steps jsonb not null default '[]',
    -- Since when the host, whose scan is complete, no longer names it.
    absent_since timestamptz,
    created_at timestamptz not null default now(),
    started_at timestamptz,
    last_active_at timestamptz,
    killed_at timestamptz,
    updated_at timestamptz not null default now()
);
create index sandboxes_team on sandboxes (team_id, created_at desc) where observed <> 'killed';
create index sandboxes_host on sandboxes (host_id) where observed <> 'killed';
create index sandboxes_deadline on sandboxes (deadline) where deadline is not null and desired <> 'killed';
create index sandboxes_absent on sandboxes (absent_since) where absent_since is not null;
create index sandboxes_killed on sandboxes (killed_at) where observed = 'killed';

-- One carrying out of one wish.
create table operations (
    id uuid primary key,
    sandbox_id text not null references sandboxes (id) on delete cascade,
    kind text not null check (kind in ('run', 'pause', 'resume', 'kill', 'clean')),
    -- The revision of the wish; a newer one supersedes this operation.
    revision bigint not null,
    phase text not null default 'open' check (phase in ('open', 'done', 'failed', 'superseded')),
    attempts integer not null default 0,
    not_before timestamptz not null default now(),
    -- Who works on it, known by an advisory lock that the replica holds as long as it lives.
    lease_owner integer,
    lease_until timestamptz,
    -- After this instant it is given up; none for what must happen in the end.
    deadline timestamptz,
    -- Hosts that said they have no room, or could not be reached at all.
    refused_hosts uuid[] not null default '{}',
    error_code text,
    error_message text,
    created_at timestamptz not null default now(),
    finished_at timestamptz
);
create index operations_open on operations (not_before) where phase = 'open';
create index operations_sandbox on operations (sandbox_id, created_at);
-- One operation of a sandbox at a time carries out one revision.
create unique index operations_once on operations (sandbox_id, revision, kind) where phase = 'open';

create table idempotency (
    scope text not null,
    key text not null,
    -- SHA-256 of method, route and body.
    args_hash bytea not null,
    -- What the first call made.
    subject text not null,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    primary key (scope, key)
);
create index idempotency_expires on idempotency (expires_at);

create table audit (
    id bigint generated always as identity primary key,
    at timestamptz not null default now(),
    team_id uuid,
    actor_kind text not null check (actor_kind in ('user', 'api_key', 'host', 'platform')),
    actor_id text not null,
    action text not null,
    subject text not null,
    request_id text not null default '',
    details jsonb not null default '{}'
);
create index audit_team on audit (team_id, id desc);

-- Secrets of the platform itself, encrypted by a key that the database does not hold.
create table keyring (
    name text primary key,
    sealed bytea not null,
    created_at timestamptz not null default now()
);
