-- Words and pairs that say what a host is, for creates that ask for such a one.
alter table hosts add column tags text[] not null default '{}';

-- What a create asked of its host: for as long as it is placed anew.
alter table sandboxes add column host_tags text[] not null default '{}';
-- None: as the platform does it.
alter table sandboxes add column strategy text
    constraint sandboxes_strategy check (strategy in ('spread', 'pack'));

-- What is reserved on a host is the sum over these.
create index sandboxes_reserving on sandboxes (host_id) where observed not in ('killed', 'failed', 'paused', 'lost');
-- For creates of a minute, also of what has ended since.
create index sandboxes_created on sandboxes (team_id, created_at);

-- What a team may have where that is not the platform's default. None in a column: the default.
create table team_quotas (
    team_id uuid primary key references teams (id) on delete cascade,
    sandboxes bigint check (sandboxes >= 0),
    running bigint check (running >= 0),
    vcpus bigint check (vcpus >= 0),
    memory_mb bigint check (memory_mb >= 0),
    disk_mb bigint check (disk_mb >= 0),
    creates_per_min bigint check (creates_per_min >= 0),
    updated_at timestamptz not null default now()
);

-- A row while so many hosts are silent that nothing is concluded from what is not heard.
create table silence_brake (
    is_on boolean primary key default true check (is_on),
    silent bigint not null,
    hosts bigint not null,
    since timestamptz not null default now()
);
