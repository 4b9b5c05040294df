-- How long each step of an operation took; and ends that nobody wished, as operations that have failed.
alter table operations add column steps jsonb not null default '[]';
alter table operations drop constraint operations_kind_check;
alter table operations add constraint operations_kind_check
    check (kind in ('run', 'pause', 'resume', 'kill', 'clean', 'snapshot', 'exit'));
