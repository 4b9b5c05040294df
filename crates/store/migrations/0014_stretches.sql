-- When sandboxes ran, for statistics and usage: one row for each stretch of time, written by the change of state itself. The program before
-- this one goes on with it and writes them, too.
create table stretches (
    sandbox_id text not null,
    -- No references: what was used is known for longer than who used it.
    team_id uuid not null,
    vcpus integer not null,
    memory_mib integer not null,
    began_at timestamptz not null default now(),
    -- Infinity: it goes on.
    ended_at timestamptz not null default 'infinity'
);
create unique index stretches_open on stretches (sandbox_id) where ended_at = 'infinity';
create index stretches_team on stretches (team_id, ended_at);
create index stretches_ended on stretches (ended_at);

-- What stretches have come to in a quarter of a day (UTC), of teams that had any.
create table usage_quarters (
    team_id uuid not null,
    began_at timestamptz not null,
    running_max bigint not null,
    vcpus_max bigint not null,
    memory_mib_max bigint not null,
    vcpu_seconds double precision not null,
    memory_mib_seconds double precision not null,
    primary key (team_id, began_at)
);
create index usage_quarters_began on usage_quarters (began_at);

-- Up to where all stretches have come into quarters.
create table usage_summed (
    is_it boolean primary key default true check (is_it),
    until timestamptz not null
);
insert into usage_summed (until) values (date_bin('6 hours', now(), timestamptz '2000-01-01 00:00:00+00'));

-- It runs from the moment at which it is known to run, and on until that is known to be over or wished.
create function keep_stretch() returns trigger language plpgsql as $$
begin
    update stretches set ended_at = now()
        where sandbox_id = new.id and ended_at = 'infinity' and new.observed not in ('running', 'pausing');
    if new.observed = 'running' then
        insert into stretches (sandbox_id, team_id, vcpus, memory_mib) values (new.id, new.team_id, new.vcpus, new.memory_mib)
            on conflict do nothing;
    end if;
    return null;
end
$$;
create trigger sandboxes_stretch_begins after insert on sandboxes
    for each row when (new.observed = 'running') execute function keep_stretch();
create trigger sandboxes_stretch after update of observed on sandboxes
    for each row when (new.observed is distinct from old.observed) execute function keep_stretch();

-- When those that run began is not known for sure; from now on it is.
insert into stretches (sandbox_id, team_id, vcpus, memory_mib)
    select id, team_id, vcpus, memory_mib from sandboxes where observed in ('running', 'pausing');
