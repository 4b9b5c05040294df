-- Two machines that speak as one host: neither is believed until somebody has looked. The program before this one knows no such state: it
-- takes it for a host that is there and takes nothing new.
alter table hosts drop constraint hosts_state_check;
alter table hosts add constraint hosts_state_check check (state in ('pending', 'active', 'draining', 'fenced'));

-- Runs of an agent that another run of the same host has followed. A process that has ended says nothing any more; one that goes on is
-- another machine's.
create table past_agent_runs (
    host_id uuid not null references hosts (id) on delete cascade,
    agent_run text not null,
    followed_at timestamptz not null default now(),
    last_sequence bigint not null,
    -- It was heard after it was followed: that may have been under way.
    heard_at timestamptz,
    primary key (host_id, agent_run)
);
