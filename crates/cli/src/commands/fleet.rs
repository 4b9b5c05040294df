//! `wrenn doctor --fleet`: how the platform as a whole is, by what its control plane sees: each finding with its cure.

use std::process::ExitCode;

use api::v1::fleet::{Fleet, FleetHost};
use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;

use super::doctor;
use crate::client::Client;
use crate::credentials::Options;
use crate::failure::Failure;
use crate::output::{Format, show};
use crate::platform::preflight::{Finding, Grade};

/// Certificates and tokens bear times, and deadlines are the database's.
const SKEW_MAX: TimeDelta = TimeDelta::seconds(5);
/// No transition takes longer, so whatever is open for longer waits for something that does not come.
const OPEN_SEC_MAX: f64 = 300.0;
/// A mail that was not delivered by then was refused several times.
const OUTBOX_SEC_MAX: f64 = 600.0;
/// A host below it takes no new sandbox of any size.
const DISK_FREE_MIB_MIN: i64 = 4096;
/// Of a list in one line.
const NAMED_MAX: usize = 5;

#[derive(Serialize)]
struct Report {
    ok: bool,
    findings: Vec<Finding>,
    fleet: Fleet,
}

pub async fn run(options: &Options, format: Format) -> Result<ExitCode, Failure> {
    let client = Client::of_administrator(options).await?;
    let fleet: Fleet = client.get(client.url(&["v1", "admin", "fleet"])).await?;
    let findings = judged(&fleet, Utc::now());
    let report = Report { ok: findings.iter().all(|finding| finding.grade != Grade::Fail), findings, fleet };
    show(format, &report, in_words)?;
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn in_words(report: &Report) -> String {
    let mut lines = doctor::lines(&report.findings);
    let worst = report.findings.iter().filter(|finding| finding.grade != Grade::Ok).count();
    lines.push(String::new());
    lines.push(match (report.ok, worst) {
        (true, 0) => "All is well.".to_owned(),
        (true, _) => "The platform works; see the lines with warn.".to_owned(),
        (false, _) => "Something needs you: see the lines with FAIL.".to_owned(),
    });
    lines.join("\n")
}

/// `here`: by this machine's clock.
fn judged(fleet: &Fleet, here: DateTime<Utc>) -> Vec<Finding> {
    let mut findings = vec![version(fleet), schema(fleet), workers(fleet)];
    findings.push(clock("clock of the database", "the control plane's", fleet.database_now, fleet.now));
    findings.push(clock("clock of this machine", "the control plane's", here, fleet.now));
    findings.extend(brake(fleet));
    findings.extend(hosts(fleet));
    findings.push(operations(fleet));
    findings.extend(sandboxes(fleet));
    findings.extend(mail(fleet));
    findings
}

fn version(fleet: &Fleet) -> Finding {
    let here = env!("CARGO_PKG_VERSION");
    if fleet.version == here {
        return Finding::ok("control plane", format!("version {here}"));
    }
    Finding::warn(
        "control plane",
        format!("version {}, and this program is {here}", fleet.version),
        "they belong together: install the same package on both machines",
    )
}

fn schema(fleet: &Fleet) -> Finding {
    let (database, program) = (fleet.schema.database, fleet.schema.program);
    if database == program {
        return Finding::ok("schema", format!("version {database}"));
    }
    Finding::warn(
        "schema",
        format!("the database's is {database}, and the replica that answered knows {program}"),
        "an upgrade is half done: bring all replicas to the newer version (docs/how-to/replicas.md)",
    )
}

fn workers(fleet: &Fleet) -> Finding {
    match fleet.workers {
        0 => Finding::fail(
            "workers",
            "no replica carries wishes out",
            "start a replica with WRENN_ROLES=workers or all (docs/how-to/replicas.md)",
        ),
        1 => Finding::ok("workers", "1 replica carries wishes out"),
        count => Finding::ok("workers", format!("{count} replicas carry wishes out")),
    }
}

fn clock(what: &str, whose: &str, one: DateTime<Utc>, other: DateTime<Utc>) -> Finding {
    let apart = one - other;
    if apart.abs() <= SKEW_MAX {
        return Finding::ok(what, format!("within {} s of {whose}", SKEW_MAX.num_seconds()));
    }
    let way = if apart > TimeDelta::zero() { "ahead of" } else { "behind" };
    Finding::warn(
        what,
        format!("{} s {way} {whose}", apart.abs().num_seconds()),
        "let chrony keep the clocks of all machines right (apt-get install chrony)",
    )
}

fn brake(fleet: &Fleet) -> Option<Finding> {
    let since = fleet.brake_since?;
    Some(Finding::fail(
        "silence",
        format!(
            "most hosts fell silent together at {since}: nothing is concluded from it, and nothing of them is changed"
        ),
        "look at the network between control plane and hosts; it ends by itself when half of them are heard again",
    ))
}

fn hosts(fleet: &Fleet) -> Vec<Finding> {
    if fleet.hosts.is_empty() {
        return vec![Finding::warn("hosts", "there is none", "wrenn host add, and wrenn host install on its machine")];
    }
    let with = |status: &str| -> Vec<&FleetHost> { fleet.hosts.iter().filter(|host| host.status == status).collect() };
    let (online, silent) = (with("online"), with("unreachable"));
    let mut findings = Vec::new();
    if online.is_empty() {
        let cure = "start wrenn-agent on one, or end its draining (wrenn host undrain)";
        findings.push(Finding::fail("hosts", "none takes sandboxes", cure));
    } else {
        findings.push(Finding::ok("hosts", format!("{} of {} take sandboxes", online.len(), fleet.hosts.len())));
    }
    if !silent.is_empty() {
        findings.push(Finding::warn(
            "hosts",
            format!("nothing is heard of {}", named(silent.iter().map(|host| host.id.as_str()))),
            "on the host: systemctl status wrenn-agent, journalctl -u wrenn-agent. What is on it is left as it is",
        ));
    }
    let fenced = with("fenced");
    if !fenced.is_empty() {
        findings.push(Finding::fail(
            "hosts",
            format!("two machines speak as one: {}", named(fenced.iter().map(|host| host.id.as_str()))),
            "stop wrenn-agent on the copy, remove its host-token and host-key.pem, then wrenn host unfence ID (docs/errors/host_fenced.md)",
        ));
    }
    let copied: Vec<&str> =
        fleet.hosts.iter().filter(|host| host.copy_heard_at.is_some()).map(|host| host.id.as_str()).collect();
    if !copied.is_empty() {
        findings.push(Finding::fail(
            "hosts",
            format!("a copy of an old state of their disk speaks, and is refused: {}", named(copied)),
            "stop wrenn-agent on the copy; if there is none and the host was restored, it is the host: then wrenn host unfence ID (docs/errors/host_fenced.md)",
        ));
    }
    let pending = with("pending");
    if !pending.is_empty() {
        findings.push(Finding::warn(
            "hosts",
            format!("never joined: {}", named(pending.iter().map(|host| host.id.as_str()))),
            "wrenn host token ID gives another token; wrenn host rm ID removes the record",
        ));
    }
    let full = online.iter().filter(|host| host.disk_free_mb.is_some_and(|free| free < DISK_FREE_MIB_MIN));
    let full: Vec<&str> = full.map(|host| host.id.as_str()).collect();
    if !full.is_empty() {
        findings.push(Finding::warn(
            "disks",
            format!("less than {} GiB free in the pool of {}", DISK_FREE_MIB_MIN / 1024, named(full)),
            "kill what is paused and not needed, delete snapshots, or give the pool more room",
        ));
    }
    let other = |host: &&FleetHost| host.agent_version.as_deref().is_some_and(|version| version != fleet.version);
    let others: Vec<&str> = fleet.hosts.iter().filter(other).map(|host| host.id.as_str()).collect();
    if !others.is_empty() {
        findings.push(Finding::warn(
            "agents",
            format!("not of version {}: {}", fleet.version, named(others)),
            "install the control plane's package on them: sandboxes go on meanwhile",
        ));
    }
    let unclaimed: Vec<&str> = fleet.hosts.iter().flat_map(|host| &host.unclaimed).map(String::as_str).collect();
    if !unclaimed.is_empty() {
        findings.push(Finding::warn(
            "unclaimed sandboxes",
            format!("hosts have what the database does not know: {}", named(unclaimed)),
            "they are left alone. Was an old copy of the database put back (docs/how-to/backup.md)?",
        ));
    }
    findings
}

fn operations(fleet: &Fleet) -> Finding {
    let overdue: i64 = fleet.operations.iter().map(|open| open.overdue).sum();
    let count: i64 = fleet.operations.iter().map(|open| open.count).sum();
    let oldest = fleet.operations.iter().max_by(|a, b| a.oldest_sec.total_cmp(&b.oldest_sec));
    match oldest {
        _ if overdue > 0 => Finding::fail(
            "operations",
            format!("{overdue} are open though their time is over"),
            "nobody works on them: look at the logs of the replicas with workers, and restart them",
        ),
        Some(oldest) if oldest.oldest_sec > OPEN_SEC_MAX => Finding::warn(
            "operations",
            format!("{count} are open, the oldest ({}) for {:.0} s", oldest.kind, oldest.oldest_sec),
            "its host does not answer: wrenn sandbox list shows which is still pausing, resuming or being killed, and why",
        ),
        _ => Finding::ok("operations", format!("{count} are open")),
    }
}

fn sandboxes(fleet: &Fleet) -> Vec<Finding> {
    let of = |state: &str| {
        fleet.sandboxes.iter().filter(|counted| counted.state == state).map(|counted| counted.count).sum()
    };
    let (lost, running, paused): (i64, i64, i64) = (of("lost"), of("running"), of("paused"));
    let mut findings = vec![Finding::ok("sandboxes", format!("{running} running, {paused} paused"))];
    if lost > 0 {
        findings.push(Finding::fail(
            "sandboxes",
            format!("{lost} were paused, and their hosts do not have them"),
            "look for their saved states on the hosts (WRENN_DIR/pool/quarantine); kill those that are not needed",
        ));
    }
    findings
}

fn mail(fleet: &Fleet) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !fleet.sends_mail {
        findings.push(Finding::warn(
            "mail",
            "none is sent: links for new people and new passwords go to the log",
            "set WRENN_SMTP_HOST (docs/how-to/accounts.md)",
        ));
    }
    let outbox = &fleet.outbox;
    if outbox.oldest_sec > OUTBOX_SEC_MAX || outbox.given_up > 0 {
        findings.push(Finding::warn(
            "outbox",
            format!(
                "{} wait, the oldest for {:.0} s; {} were given up within a day",
                outbox.count, outbox.oldest_sec, outbox.given_up
            ),
            "the log of the control plane says what the mail server answered",
        ));
    } else {
        findings.push(Finding::ok("outbox", format!("{} wait", outbox.count)));
    }
    findings
}

fn named<'a>(all: impl IntoIterator<Item = &'a str>) -> String {
    let all: Vec<&str> = all.into_iter().collect();
    let first = all[..all.len().min(NAMED_MAX)].join(", ");
    match all.len().saturating_sub(NAMED_MAX) {
        0 => first,
        more => format!("{first} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use api::v1::fleet::{Counted, OpenOperations, Schema, Waiting};

    use super::*;

    fn host(id: &str, status: &str) -> FleetHost {
        FleetHost {
            id: id.to_owned(),
            status: status.to_owned(),
            agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            isolation: Some("firecracker/kvm".to_owned()),
            last_heartbeat_at: None,
            copy_heard_at: None,
            disk_free_mb: Some(100_000),
            unclaimed: Vec::new(),
        }
    }

    fn well(now: DateTime<Utc>) -> Fleet {
        Fleet {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            schema: Schema { database: 9, program: 9 },
            now,
            database_now: now,
            workers: 2,
            sends_mail: true,
            outbox: Waiting { count: 1, oldest_sec: 1.0, given_up: 0 },
            operations: vec![OpenOperations { kind: "run".to_owned(), count: 3, oldest_sec: 2.0, overdue: 0 }],
            hosts: vec![host("host-1", "online")],
            sandboxes: vec![Counted { state: "running".to_owned(), count: 7 }],
            brake_since: None,
        }
    }

    #[test]
    fn a_platform_that_is_well_is_told_so_and_each_fault_has_a_cure() {
        let now = Utc::now();
        let fine = judged(&well(now), now);
        assert!(fine.iter().all(|finding| finding.grade == Grade::Ok && finding.cure.is_empty()), "{fine:?}");
        type Break = fn(&mut Fleet);
        let faults: [(Break, Grade, &str); 19] = [
            (
                |fleet| {
                    fleet.version = "0.0.9".to_owned();
                    fleet.hosts[0].agent_version = Some(fleet.version.clone());
                },
                Grade::Warn,
                "control plane",
            ),
            (|fleet| fleet.schema.program = 8, Grade::Warn, "schema"),
            (|fleet| fleet.workers = 0, Grade::Fail, "workers"),
            (|fleet| fleet.database_now += TimeDelta::seconds(9), Grade::Warn, "clock of the database"),
            (|fleet| fleet.brake_since = Some(fleet.now), Grade::Fail, "silence"),
            (|fleet| fleet.hosts.clear(), Grade::Warn, "hosts"),
            (|fleet| fleet.hosts[0].status = "draining".to_owned(), Grade::Fail, "hosts"),
            (|fleet| fleet.hosts.push(host("host-2", "unreachable")), Grade::Warn, "hosts"),
            (|fleet| fleet.hosts.push(host("host-4", "fenced")), Grade::Fail, "hosts"),
            (|fleet| fleet.hosts.push(host("host-3", "pending")), Grade::Warn, "hosts"),
            (|fleet| fleet.hosts[0].copy_heard_at = Some(Utc::now()), Grade::Fail, "hosts"),
            (|fleet| fleet.hosts[0].disk_free_mb = Some(100), Grade::Warn, "disks"),
            (|fleet| fleet.hosts[0].agent_version = Some("0".to_owned()), Grade::Warn, "agents"),
            (|fleet| fleet.hosts[0].unclaimed.push("sb1".to_owned()), Grade::Warn, "unclaimed sandboxes"),
            (|fleet| fleet.operations[0].overdue = 1, Grade::Fail, "operations"),
            (|fleet| fleet.operations[0].oldest_sec = 1e6, Grade::Warn, "operations"),
            (|fleet| fleet.sandboxes[0].state = "lost".to_owned(), Grade::Fail, "sandboxes"),
            (|fleet| fleet.sends_mail = false, Grade::Warn, "mail"),
            (|fleet| fleet.outbox.given_up = 1, Grade::Warn, "outbox"),
        ];
        for (make, grade, what) in faults {
            let mut fleet = well(now);
            make(&mut fleet);
            let bad: Vec<Finding> =
                judged(&fleet, now).into_iter().filter(|finding| finding.grade != Grade::Ok).collect();
            assert!(
                bad.len() == 1 && bad[0].grade == grade && bad[0].what == what && !bad[0].cure.is_empty(),
                "{what}: {bad:?}"
            );
        }
        let late = judged(&well(now), now - TimeDelta::hours(1));
        assert!(late.iter().any(|finding| finding.found == "3600 s behind the control plane's"), "{late:?}");
    }

    #[test]
    fn long_lists_are_cut() {
        assert_eq!(named(["a", "b"]), "a, b");
        assert_eq!(named(["1", "2", "3", "4", "5", "6", "7"]), "1, 2, 3, 4, 5 and 2 more");
    }
}
