-- What is to be told to the world outside, and the platform's own part of the audit. The program before this one goes on with it: it knows
-- nothing of the new table.

create table outbox (
    id uuid primary key,
    kind text not null,
    -- By a key that the database does not hold.
    sealed bytea not null,
    created_at timestamptz not null default now(),
    next_at timestamptz not null default now(),
    attempts integer not null default 0,
    -- Until then somebody is delivering it.
    lease_until timestamptz,
    expires_at timestamptz not null,
    given_up_at timestamptz,
    problem text
);
create index outbox_due on outbox (next_at) where given_up_at is null;
create index outbox_given_up on outbox (given_up_at) where given_up_at is not null;

-- What administrators did to hosts and people was written down as done in the team for which their session acted.
update audit set team_id = null where team_id is not null and (action like 'host.%' or action like 'user.%');
