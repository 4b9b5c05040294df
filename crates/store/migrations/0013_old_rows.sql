-- Ended operations are found without a look at all of them.
create index operations_ended on operations (finished_at) where phase <> 'open';
-- Of a host that is removed, killed ones too.
create index sandboxes_of_host on sandboxes (host_id) where host_id is not null;
