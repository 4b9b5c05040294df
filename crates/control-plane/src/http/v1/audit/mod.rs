//! `/v1/audit-logs` and `/v1/admin/audit-logs`: who did what, newest first.

mod list;
mod list_all;
mod query;

use api::v1::audit::{AuditEntry, AuditLog};
use store::audit_log::Entry;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

/// What all members of a team see: kinds of subjects, and single actions.
const OF_ALL: [&str; 6] = ["sandbox", "snapshot", "team", "api_key", "host.marked_down", "host.marked_up"];
/// What those see who decide about people and hosts.
const OF_ADMINS: [&str; 4] = ["member", "invitation", "session", "host"];

/// Below `/v1`.
pub fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new().routes(routes!(list::list)).routes(routes!(list_all::list))
}

fn page(entries: Vec<Entry>, is_platforms: bool) -> AuditLog {
    let last = entries.last().map(|entry| (entry.at, query::id(entry.id)));
    let (next_before, next_before_id) = last.unzip();
    let items = entries.into_iter().map(|entry| shown(entry, is_platforms)).collect();
    AuditLog { items, next_before, next_before_id }
}

fn shown(entry: Entry, is_platforms: bool) -> AuditEntry {
    let (kind, verb) = entry.action.split_once('.').unwrap_or(("", &entry.action));
    AuditEntry {
        id: query::id(entry.id),
        actor_type: if entry.actor_kind == "platform" { "system".to_owned() } else { entry.actor_kind },
        actor_id: entry.actor_id,
        actor_name: entry.actor_name,
        scope: match kind {
            _ if is_platforms => "platform",
            kind if OF_ALL.contains(&kind) || OF_ALL.contains(&entry.action.as_str()) => "team",
            _ => "admin",
        }
        .to_owned(),
        status: status(verb).to_owned(),
        resource_type: kind.to_owned(),
        resource_id: entry.subject,
        action: verb.to_owned(),
        metadata: entry.details,
        request_id: entry.request_id,
        created_at: entry.at,
    }
}

/// How much a reader wants to see it.
fn status(verb: &str) -> &'static str {
    match verb {
        "create" | "add" | "accept" | "snapshot" | "fork" | "resume" | "pause" | "register" | "activate" | "enable"
        | "connect" | "marked_up" => "success",
        "marked_down" => "error",
        "delete" | "kill" | "remove" | "revoke" | "disable" | "disconnect" | "on" => "warning",
        _ => "info",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_something_away_is_a_warning() {
        for (verb, said) in [
            ("create", "success"),
            ("kill", "warning"),
            ("rename", "info"),
            ("marked_down", "error"),
            ("marked_up", "success"),
            ("", "info"),
        ] {
            assert_eq!(status(verb), said, "{verb}");
        }
    }
}
