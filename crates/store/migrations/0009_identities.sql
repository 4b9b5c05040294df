-- Other ways to log in, what is to be told to the world outside, and the platform's own part of the audit. The program before this one goes
-- on with it: it knows none of the new tables.

-- A person as another site knows them. The site is named by the settings; what it calls the person never changes, addresses do.
create table identities (
    provider text not null,
    subject text not null,
    user_id uuid not null references users (id) on delete cascade,
    -- At the last login, for people to see which account it is.
    email text not null,
    created_at timestamptz not null default now(),
    primary key (provider, subject)
);
-- A person has one account of a site.
create unique index identities_user on identities (user_id, provider);

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
