-- Lists that are asked for by labels. Without labels a sandbox is in none of them, and costs nothing here.
create index sandboxes_metadata on sandboxes using gin (metadata jsonb_path_ops) where observed <> 'killed' and metadata <> '{}';
-- By a state that few are in.
create index sandboxes_status on sandboxes (team_id, sandbox_status(desired, observed), created_at desc) where observed <> 'killed';
