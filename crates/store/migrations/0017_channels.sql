-- Where teams are told of what happens, and what is still to be told.
create table channels (
    id uuid primary key,
    team_id uuid not null references teams,
    name text not null,
    provider text not null,
    -- By a key that the database does not hold: addresses of chats are secrets, as tokens are.
    config bytea not null,
    events text[] not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    -- For people who wonder whether it works.
    delivered_at timestamptz,
    problem_at timestamptz,
    problem text,
    unique (team_id, name)
);

-- Of a notification `sealed` is what is told, in plain JSON. It goes with its channel.
alter table outbox add column channel_id uuid references channels on delete cascade;
create index outbox_of_channel on outbox (channel_id, created_at, id) where channel_id is not null and given_up_at is null;
