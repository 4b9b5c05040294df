//! Every route of the API has a command, or a reason why no person needs one: a new route needs a decision here.

use clap::CommandFactory as _;

use super::Arguments;

enum By {
    /// Words of the command that calls it.
    Command(&'static str),
    /// Why there is none.
    Nobody(&'static str),
}

use By::{Command, Nobody};

const BROWSER: &str = "a browser's: what comes back is a cookie of its";
const HOST: &str = "a host agent's";
const PLATFORMS: &str = "administrators' pages; `wrenn sandbox` does the same with a key of the platform's team";
const OLDER: &str = "the same is done by `files/content`; this form is for published clients";

const COVERED: &[(&str, &str, By)] = &[
    ("GET", "/", Nobody("says where the rest is")),
    ("GET", "/health", Command("version")),
    ("GET", "/health/ready", Nobody("a load balancer's")),
    ("GET", "/health/live", Nobody("a supervisor's")),
    ("GET", "/openapi.json", Nobody("a document for programs that make clients")),
    ("GET", "/openapi.yaml", Nobody("a document for programs that make clients")),
    ("GET", "/docs", Nobody("pages")),
    ("GET", "/docs/", Nobody("pages")),
    ("GET", "/docs/{*rest}", Nobody("pages")),
    ("POST", "/v1/auth/signup", Command("account signup")),
    ("POST", "/v1/auth/activate", Command("account activate")),
    ("POST", "/v1/auth/login", Command("login")),
    ("POST", "/v1/auth/logout", Command("logout")),
    ("POST", "/v1/auth/switch-team", Command("team switch")),
    ("GET", "/auth/oauth/{provider}", Nobody(BROWSER)),
    ("GET", "/auth/oauth/{provider}/callback", Nobody(BROWSER)),
    ("GET", "/v1/me/providers/{provider}/connect", Nobody(BROWSER)),
    ("DELETE", "/v1/me/providers/{provider}", Command("account disconnect")),
    ("POST", "/v1/me/password/reset", Command("account reset")),
    ("POST", "/v1/me/password/reset/confirm", Command("account confirm-reset")),
    ("GET", "/v1/me", Command("account show")),
    ("DELETE", "/v1/me", Command("account delete")),
    ("PATCH", "/v1/me", Command("account rename")),
    ("POST", "/v1/me/password", Command("account password")),
    ("GET", "/v1/me/sessions", Command("account sessions")),
    ("DELETE", "/v1/me/sessions/{id}", Command("account end-session")),
    ("GET", "/v1/teams", Command("team list")),
    ("POST", "/v1/teams", Command("team create")),
    ("GET", "/v1/teams/{id}", Command("team get")),
    ("PATCH", "/v1/teams/{id}", Command("team rename")),
    ("DELETE", "/v1/teams/{id}", Command("team delete")),
    ("GET", "/v1/teams/{id}/members", Command("team members")),
    ("POST", "/v1/teams/{id}/members", Command("team add")),
    ("PATCH", "/v1/teams/{id}/members/{user_id}", Command("team role")),
    ("DELETE", "/v1/teams/{id}/members/{user_id}", Command("team remove")),
    ("POST", "/v1/teams/{id}/leave", Command("team leave")),
    ("GET", "/v1/teams/{id}/invitations", Command("team invitations")),
    ("POST", "/v1/teams/{id}/invitations", Command("team invite")),
    ("DELETE", "/v1/teams/{id}/invitations/{invitation_id}", Command("team revoke")),
    ("POST", "/v1/invitations/accept", Command("team accept")),
    ("GET", "/v1/users/search", Nobody("completes what is typed on a page; `team add` takes the whole address")),
    ("GET", "/v1/audit-logs", Command("audit")),
    ("GET", "/v1/admin/audit-logs", Command("audit")),
    ("GET", "/v1/admin/fleet", Command("doctor")),
    ("GET", "/v1/admin/teams", Command("admin team list")),
    ("DELETE", "/v1/admin/teams/{id}", Command("admin team delete")),
    ("PUT", "/v1/admin/teams/{id}/byoc", Command("team byoc")),
    ("GET", "/v1/admin/users", Command("admin user list")),
    ("POST", "/v1/admin/users", Command("admin user create")),
    ("PUT", "/v1/admin/users/{id}/active", Command("admin user disable")),
    ("PUT", "/v1/admin/users/{id}/admin", Command("admin user promote")),
    ("POST", "/v1/admin/users/{id}/link", Command("admin user link")),
    ("GET", "/v1/admin/templates", Command("admin template list")),
    ("DELETE", "/v1/admin/templates/{id}", Command("admin template delete")),
    ("POST", "/v1/admin/builds", Command("admin build create")),
    ("GET", "/v1/admin/builds", Command("admin build list")),
    ("GET", "/v1/admin/builds/{id}", Command("admin build get")),
    ("POST", "/v1/admin/builds/{id}/cancel", Command("admin build cancel")),
    ("POST", "/v1/admin/capsules/{id}/snapshot", Command("admin template publish")),
    ("POST", "/v1/admin/capsules", Nobody(PLATFORMS)),
    ("GET", "/v1/admin/capsules", Nobody(PLATFORMS)),
    ("GET", "/v1/admin/capsules/{id}", Nobody(PLATFORMS)),
    ("DELETE", "/v1/admin/capsules/{id}", Nobody(PLATFORMS)),
    ("POST", "/v1/admin/capsules/{id}/exec", Nobody(PLATFORMS)),
    ("GET", "/v1/admin/capsules/{id}/exec/stream", Nobody(PLATFORMS)),
    ("GET", "/v1/admin/capsules/{id}/processes", Nobody(PLATFORMS)),
    ("DELETE", "/v1/admin/capsules/{id}/processes/{selector}", Nobody(PLATFORMS)),
    ("GET", "/v1/admin/capsules/{id}/processes/{selector}/stream", Nobody(PLATFORMS)),
    ("GET", "/v1/admin/capsules/{id}/pty", Nobody(PLATFORMS)),
    ("GET", "/v1/admin/capsules/{id}/metrics", Nobody(PLATFORMS)),
    ("POST", "/v1/admin/capsules/{id}/files/read", Nobody(PLATFORMS)),
    ("POST", "/v1/admin/capsules/{id}/files/write", Nobody(PLATFORMS)),
    ("POST", "/v1/admin/capsules/{id}/files/list", Nobody(PLATFORMS)),
    ("POST", "/v1/admin/capsules/{id}/files/mkdir", Nobody(PLATFORMS)),
    ("POST", "/v1/admin/capsules/{id}/files/remove", Nobody(PLATFORMS)),
    ("POST", "/v1/api-keys", Command("key create")),
    ("GET", "/v1/api-keys", Command("key list")),
    ("DELETE", "/v1/api-keys/{id}", Command("key rm")),
    ("GET", "/v1/channels", Command("channel list")),
    ("POST", "/v1/channels", Command("channel create")),
    ("POST", "/v1/channels/test", Command("channel test")),
    ("GET", "/v1/channels/{id}", Command("channel get")),
    ("PATCH", "/v1/channels/{id}", Command("channel edit")),
    ("DELETE", "/v1/channels/{id}", Command("channel rm")),
    ("PUT", "/v1/channels/{id}/config", Command("channel config")),
    ("POST", "/v1/hosts", Command("host add")),
    ("GET", "/v1/hosts", Command("host list")),
    ("GET", "/v1/hosts/{id}", Command("host get")),
    ("DELETE", "/v1/hosts/{id}", Command("host rm")),
    ("POST", "/v1/hosts/{id}/token", Command("host token")),
    ("GET", "/v1/hosts/{id}/inspect", Command("host inspect")),
    ("GET", "/v1/hosts/{id}/delete-preview", Command("host rm")),
    ("POST", "/v1/hosts/{id}/drain", Command("host drain")),
    ("POST", "/v1/hosts/{id}/undrain", Command("host undrain")),
    ("POST", "/v1/hosts/{id}/unfence", Command("host unfence")),
    ("GET", "/v1/hosts/{id}/tags", Command("host tag")),
    ("POST", "/v1/hosts/{id}/tags", Command("host tag")),
    ("DELETE", "/v1/hosts/{id}/tags/{tag}", Command("host tag")),
    ("GET", "/v1/hosts/silence", Command("host list")),
    ("POST", "/v1/hosts/register", Nobody(HOST)),
    ("POST", "/v1/hosts/{id}/renew", Nobody(HOST)),
    ("POST", "/v1/hosts/{id}/heartbeat", Nobody(HOST)),
    ("GET", "/v1/teams/self/quotas", Command("quota get")),
    ("GET", "/v1/teams/{id}/quotas", Command("quota get")),
    ("PUT", "/v1/teams/{id}/quotas", Command("quota set")),
    ("GET", "/v1/events", Command("events")),
    ("GET", "/v1/events/stream", Nobody("for published clients; `events -f` listens to the one that tells all")),
    ("GET", "/v1/events/all/stream", Command("events")),
    ("POST", "/v1/sandboxes", Command("sandbox create")),
    ("GET", "/v1/sandboxes", Command("sandbox list")),
    ("GET", "/v1/sandboxes/stats", Command("sandbox stats")),
    ("GET", "/v1/sandboxes/usage", Command("usage")),
    ("GET", "/v1/sandboxes/{id}", Command("sandbox get")),
    ("PATCH", "/v1/sandboxes/{id}", Command("sandbox edit")),
    ("DELETE", "/v1/sandboxes/{id}", Command("sandbox kill")),
    ("POST", "/v1/sandboxes/{id}/pause", Command("sandbox pause")),
    ("POST", "/v1/sandboxes/{id}/resume", Command("sandbox resume")),
    ("POST", "/v1/sandboxes/{id}/timeout", Command("sandbox timeout")),
    ("POST", "/v1/sandboxes/{id}/ping", Command("sandbox ping")),
    ("POST", "/v1/sandboxes/{id}/fork", Command("sandbox fork")),
    ("GET", "/v1/sandboxes/{id}/timeline", Command("sandbox timeline")),
    ("GET", "/v1/sandboxes/{id}/metrics", Command("sandbox metrics")),
    ("POST", "/v1/sandboxes/{id}/exec", Command("sandbox exec")),
    ("GET", "/v1/sandboxes/{id}/exec/stream", Command("sandbox exec")),
    ("GET", "/v1/sandboxes/{id}/pty", Command("shell")),
    ("GET", "/v1/sandboxes/{id}/processes", Command("sandbox ps")),
    ("DELETE", "/v1/sandboxes/{id}/processes/{selector}", Command("sandbox signal")),
    ("GET", "/v1/sandboxes/{id}/processes/{selector}/stream", Command("logs")),
    ("GET", "/v1/sandboxes/{id}/console", Command("logs")),
    ("GET", "/v1/sandboxes/{id}/files/content", Command("files get")),
    ("PUT", "/v1/sandboxes/{id}/files/content", Command("files put")),
    ("POST", "/v1/sandboxes/{id}/files/list", Command("files ls")),
    ("POST", "/v1/sandboxes/{id}/files/stat", Command("files stat")),
    ("POST", "/v1/sandboxes/{id}/files/mkdir", Command("files mkdir")),
    ("POST", "/v1/sandboxes/{id}/files/remove", Command("files rm")),
    ("POST", "/v1/sandboxes/{id}/files/move", Command("files mv")),
    ("POST", "/v1/sandboxes/{id}/files/read", Nobody(OLDER)),
    ("POST", "/v1/sandboxes/{id}/files/write", Nobody(OLDER)),
    ("POST", "/v1/sandboxes/{id}/files/stream/read", Command("sandbox cp")),
    ("POST", "/v1/sandboxes/{id}/files/stream/write", Command("sandbox cp")),
    ("POST", "/v1/snapshots", Command("snapshot create")),
    ("GET", "/v1/snapshots", Command("snapshot list")),
    ("DELETE", "/v1/snapshots/{id}", Command("snapshot delete")),
];

/// The control plane's table, as it is written: a program that depended on it would depend on another program.
fn routes() -> Vec<(String, String)> {
    let place = concat!(env!("CARGO_MANIFEST_DIR"), "/../control-plane/src/http/access.rs");
    let text = std::fs::read_to_string(place).unwrap();
    let table = text.split_once("pub const TABLE").unwrap().1.split_once("\n];").unwrap().0;
    let route = |line: &str| {
        let mut words = line.trim().strip_prefix("(\"")?.split('"');
        let (method, path) = (words.next()?, words.nth(1)?);
        Some((method.to_owned(), path.to_owned()))
    };
    table.lines().filter_map(route).collect()
}

#[test]
fn every_route_has_a_command_or_a_reason() {
    let routes = routes();
    assert!(routes.len() > 90, "the table was not found: {}", routes.len());
    let is_covered = |(method, path): &&(String, String)| COVERED.iter().any(|(m, p, _)| m == method && p == path);
    let missing: Vec<_> = routes.iter().filter(|route| !is_covered(route)).collect();
    assert!(missing.is_empty(), "give these routes a command, or a reason why no person needs one: {missing:#?}");
    let is_there = |method: &str, path: &str| routes.iter().any(|(m, p)| m == method && p == path);
    let gone: Vec<_> = COVERED.iter().filter(|(m, p, _)| !is_there(m, p)).map(|(m, p, _)| format!("{m} {p}")).collect();
    assert!(gone.is_empty(), "there are no such routes: {gone:#?}");
}

#[test]
fn the_commands_exist_and_the_reasons_say_something() {
    let all = Arguments::command();
    for (method, path, by) in COVERED {
        match by {
            Command(words) => {
                let found = words.split(' ').try_fold(&all, |command, word| command.find_subcommand(word));
                let found = found.unwrap_or_else(|| panic!("{method} {path}: there is no `wrenn {words}`"));
                assert!(!found.has_subcommands(), "{method} {path}: `wrenn {words}` is a group");
            }
            Nobody(reason) => assert!(!reason.is_empty(), "{method} {path}"),
        }
    }
}

#[test]
fn every_command_and_every_group_says_what_it_is_for() {
    fn check(command: &clap::Command, name: &str) {
        for sub in command.get_subcommands() {
            let name = format!("{name} {}", sub.get_name());
            assert!(sub.get_name() == "list" || sub.get_about().is_some(), "{name} has no help");
            check(sub, &name);
        }
    }
    let all = Arguments::command();
    all.clone().debug_assert();
    check(&all, "wrenn");
}
