-- Accounts: people who are asked in, log in and can be put out again. The program before this one goes on with it: it knows the columns that
-- it writes, and those that are new have defaults.

alter table users drop constraint users_status_check;
-- pending: has not yet shown that the address is theirs.
alter table users add constraint users_status_check check (status in ('pending', 'active', 'disabled'));

alter table teams add column slug text not null
    default (substr(md5(random()::text), 1, 6) || '-' || substr(md5(random()::text), 1, 6));
create unique index teams_slug on teams (slug);
-- Rows of a team's sandboxes outlive it.
alter table teams add column deleted_at timestamptz;

-- One login. A token that names a session which is not here opens nothing.
create table sessions (
    id uuid primary key,
    user_id uuid not null references users (id) on delete cascade,
    -- In whose name the session acts, when its token does not name another team of the person's.
    team_id uuid references teams (id) on delete set null,
    -- SHA-256 of the cookie's 32 random bytes; none for sessions that are shown by token alone.
    cookie_hash bytea unique,
    created_at timestamptz not null default now(),
    last_seen_at timestamptz not null default now(),
    expires_at timestamptz not null
);
create index sessions_user on sessions (user_id);
create index sessions_expires on sessions (expires_at);

-- What is sent by mail: it works once, and is known by its hash alone.
create table account_tokens (
    token_hash bytea primary key,
    user_id uuid not null references users (id) on delete cascade,
    kind text not null check (kind in ('activation', 'password_reset')),
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    used_at timestamptz
);
create index account_tokens_user on account_tokens (user_id, kind);
create index account_tokens_expires on account_tokens (expires_at);

create table invitations (
    id uuid primary key,
    team_id uuid not null references teams (id) on delete cascade,
    email text not null,
    role text not null check (role in ('owner', 'admin', 'member')),
    token_hash bytea not null unique,
    invited_by uuid references users (id) on delete set null,
    created_at timestamptz not null default now(),
    expires_at timestamptz not null,
    accepted_at timestamptz
);
-- A second invitation of the same person takes the place of the first.
create unique index invitations_open on invitations (team_id, lower(email)) where accepted_at is null;

-- Tries of one kind on one address within a window of time, counted before they are looked at.
create table attempts (
    -- SHA-256 of kind and address.
    subject bytea primary key,
    count integer not null,
    window_ends_at timestamptz not null
);
create index attempts_window on attempts (window_ends_at);

-- Keys of before may do what they could: everything.
alter table api_keys add column scopes text[] not null
    default '{sandboxes:read,sandboxes:write,sandboxes:use,snapshots:read,snapshots:write,api-keys}';
alter table api_keys add column expires_at timestamptz;
