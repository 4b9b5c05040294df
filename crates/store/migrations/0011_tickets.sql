-- Each answer to a heartbeat carries a numbered ticket, and the next heartbeat shows it: which one was issued last, and which one was shown
-- last. Null: the next heartbeat begins a chain. The program before this one neither asks for tickets nor gives any.
alter table hosts add column ticket_issued bigint not null default 0;
alter table hosts add column ticket_shown bigint;

-- When a copy of an old state of the host's disk was last heard: it is refused, the host goes on, and somebody has to look.
alter table hosts add column copy_heard_at timestamptz;

-- Of a host that is fenced: what it is again afterwards.
alter table hosts add column was_draining boolean not null default false;

-- A run that came with an old ticket: nothing of it was ever taken in.
alter table past_agent_runs add column is_copy boolean not null default false;
