-- What becomes of a sandbox whose time is over.
alter table sandboxes add column on_timeout text not null default 'kill'
    constraint sandboxes_on_timeout check (on_timeout in ('kill', 'pause'));
