-- What the last pause was to keep: with its memory a sandbox goes on where it stood, of its disk alone it boots.
alter table sandboxes add column kept text not null default 'memory'
    constraint sandboxes_kept check (kept in ('memory', 'disk'));
alter table sandboxes drop constraint sandboxes_on_timeout;
alter table sandboxes add constraint sandboxes_on_timeout check (on_timeout in ('kill', 'pause', 'pause_disk'));

-- Whether a call that needs it to run lets one that is paused with its memory run again.
alter table sandboxes add column auto_resume boolean not null default false;
