-- Ended operations are found without a look at all of them.
create index operations_ended on operations (finished_at) where phase <> 'open';
