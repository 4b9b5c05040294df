-- What the last pause has kept: with its memory a sandbox goes on where it stood, of its disk alone it boots.
alter table sandboxes add column kept text not null default 'memory'
    constraint sandboxes_kept check (kept in ('memory', 'disk'));
-- What a pause at the end of its time is to keep. Beside `on_timeout`, whose words control planes of before know.
alter table sandboxes add column timeout_keeps text not null default 'memory'
    constraint sandboxes_timeout_keeps check (timeout_keeps in ('memory', 'disk'));

-- Whether a call that needs it to run lets one that is paused with its memory run again.
alter table sandboxes add column auto_resume boolean not null default false;
