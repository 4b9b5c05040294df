-- Hosts of a team's own (BYOC). The program before this one goes on: it makes hosts of the platform, whose team is none.
alter table teams add column is_byoc boolean not null default false;

alter table hosts drop constraint hosts_kind_check;
alter table hosts add constraint hosts_kind_check check (kind in ('regular', 'byoc'));
-- Whose it is; none: the platform's. It never changes.
alter table hosts add column team_id uuid references teams (id);
alter table hosts add constraint hosts_owner check ((kind = 'byoc') = (team_id is not null));
create index hosts_team on hosts (team_id) where team_id is not null;
-- Since when its team knows that it is silent.
alter table hosts add column marked_down_at timestamptz;

-- A team's host takes nobody else's sandboxes, whatever a program thinks: the one before this one does not know that hosts have owners.
create function sandbox_on_foreign_host() returns trigger language plpgsql as $$
begin
    if exists (select 1 from hosts where id = new.host_id and team_id <> new.team_id) then
        raise exception 'sandbox % is not of the team of host %', new.id, new.host_id using errcode = 'check_violation';
    end if;
    return new;
end
$$;
create trigger sandboxes_host_team before insert or update of host_id, team_id on sandboxes
    for each row when (new.host_id is not null) execute function sandbox_on_foreign_host();
