-- What has been idle for this long ends as what has reached its deadline; 0: never.
alter table sandboxes add column idle_timeout_sec bigint not null default 0;
-- Since when its host says that nothing happens in it; none while it works, and of one whose idle time does not count.
alter table sandboxes add column idle_since timestamptz;
create index sandboxes_idle on sandboxes (idle_since) where idle_since is not null;
create index sandboxes_idle_timeout on sandboxes (host_id) where idle_timeout_sec > 0 and observed <> 'killed';

-- When the host last said what is idle.
alter table hosts add column idle_reported_at timestamptz;
