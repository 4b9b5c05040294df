//! Tickets of heartbeats: a copy of an old state of a host's disk is known before anything of it is taken in, and nothing else is taken for
//! one.

mod replica;

use model::ids::{HostId, SandboxId};
use replica::{Answer, Replica, Who};
use reqwest::Method;
use serde_json::{Value, json};

/// A host that nobody runs, and what it would say.
struct Host {
    replica: Replica,
    id: HostId,
    sandbox: SandboxId,
    jwt: String,
}

impl Host {
    async fn new() -> Self {
        let replica = Replica::start().await;
        let id = replica.host(4096).await;
        let (sandbox, jwt) = (replica.sandbox(id).await, replica.token_of_host(id));
        Self { replica, id, sandbox, jwt }
    }

    /// That its sandbox runs.
    async fn beat(&self, run: &str, sequence: u64, ticket: Option<&str>) -> Answer {
        self.says("running", run, sequence, ticket).await
    }

    async fn says(&self, observed: &str, run: &str, sequence: u64, ticket: Option<&str>) -> Answer {
        let url = self.replica.url.clone();
        self.says_to(&url, observed, run, sequence, ticket).await
    }

    async fn says_to(&self, url: &str, observed: &str, run: &str, sequence: u64, ticket: Option<&str>) -> Answer {
        let mut body = json!({"epoch": 1, "sequence": sequence, "agent_run": run, "memory_free_mb": 1000, "disk_free_mb": 10_000,
            "complete": true, "facts": {"arch": "x86_64", "cpu_cores": 2, "memory_mb": 4096, "disk_gb": 20, "isolation": "emulation",
                "agent_version": "0.1.0", "templates": ["minimal"]},
            "sandboxes": [{"id": self.sandbox.as_str(), "observed": observed, "revision": 1}]});
        if let Some(ticket) = ticket {
            body["ticket"] = json!(ticket);
        }
        let request = self.replica.http.post(format!("{url}/v1/hosts/{}/heartbeat", self.id)).json(&body);
        self.replica.send(Who::Bearer(&self.jwt), request).await
    }

    /// The ticket of an answer that was a yes.
    async fn ticket(&self, run: &str, sequence: u64, shown: &str) -> String {
        let answer = self.beat(run, sequence, Some(shown)).await;
        assert_eq!(answer.status, 200, "{run} {sequence} {shown}: {}", answer.body);
        answer.body["ticket"].as_str().unwrap_or_else(|| panic!("no ticket: {}", answer.body)).to_owned()
    }

    /// So many tickets of one run, one after the other; the first is none.
    async fn chain(&self, run: &str, count: usize) -> Vec<String> {
        let mut all = vec![String::new()];
        for sequence in 1..=count {
            all.push(self.ticket(run, u64::try_from(sequence).unwrap(), all.last().unwrap()).await);
        }
        all
    }

    async fn renew(&self, address: &str, ticket: Option<&str>) -> Answer {
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        let mut body = json!({"csr_pem": csr, "address": address});
        if let Some(ticket) = ticket {
            body["ticket"] = json!(ticket);
        }
        self.replica
            .call(Who::Bearer(&self.jwt), Method::POST, &format!("/v1/hosts/{}/renew", self.id), Some(body))
            .await
    }

    async fn as_admin(&self, method: Method, verb: &str) -> Value {
        let answer = self.replica.as_admin(method, &format!("/v1/hosts/{}{verb}", self.id), None).await;
        assert_eq!(answer.status, 200, "{verb}: {}", answer.body);
        answer.body
    }

    async fn shown(&self) -> Value {
        self.as_admin(Method::GET, "").await
    }

    /// Half a minute passes for whoever was refused.
    async fn later(&self) {
        self.replica.database.sql("update past_agent_runs set heard_at = heard_at - interval '30 seconds'").await;
    }

    async fn is_untouched(&self) {
        let shown = self.shown().await;
        assert_eq!((&shown["status"], &shown["address"]), (&json!("online"), &json!("127.0.0.1:1")), "{shown}");
        let sandbox = self.replica.as_team(Method::GET, &format!("/v1/sandboxes/{}", self.sandbox), None).await;
        assert_eq!(sandbox.body["status"], "running");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_an_old_disk_is_refused_before_it_acts_and_the_host_goes_on() {
    let host = Host::new().await;
    let chain = host.chain("a", 5).await;
    for old in &chain[..4] {
        let refused = host.says("failed", "copy", 1, Some(old)).await;
        assert_eq!(refused.error(), (409, "host_fenced"), "{old}");
        let refused = host.renew("127.0.0.1:2", Some(old)).await;
        assert_eq!(refused.error(), (409, "host_fenced"), "{old}");
    }
    host.is_untouched().await;
    // One process that has died may have said that: nobody is called yet.
    assert_eq!(host.says("failed", "copy", 2, Some(&chain[3])).await.error(), (409, "host_fenced"));
    assert_eq!((host.replica.audited("host.fence").await, &host.shown().await["copy_heard_at"]), (0, &Value::Null));
    host.later().await;
    for sequence in 3..5 {
        assert_eq!(host.says("failed", "copy", sequence, Some(&chain[3])).await.error(), (409, "host_fenced"));
    }
    assert_eq!(host.replica.audited("host.fence").await, 1, "once until somebody has looked");
    assert!(host.shown().await["copy_heard_at"].is_string());
    let fleet = host.replica.as_admin(Method::GET, "/v1/admin/fleet", None).await;
    assert!(fleet.body["hosts"][0]["copy_heard_at"].is_string(), "{}", fleet.body);
    assert_eq!(host.replica.serving.app.store.numbers().await.unwrap().copied_hosts, 1);
    host.is_untouched().await;
    let next = host.ticket("a", 6, &chain[5]).await;
    assert_eq!(host.renew("127.0.0.1:1", Some(&next)).await.status, 200);

    // Somebody has looked: the host goes on, and what was old stays old.
    assert_eq!(host.as_admin(Method::POST, "/unfence").await["copy_heard_at"], Value::Null);
    let next = host.ticket("a", 7, &next).await;
    assert_eq!(host.beat("copy", 5, Some(&chain[3])).await.error(), (409, "host_fenced"));
    host.ticket("a", 8, &next).await;
    host.is_untouched().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_restored_from_a_backup_goes_on_when_it_is_unfenced() {
    let host = Host::new().await;
    let chain = host.chain("a", 5).await;
    assert_eq!(host.beat("restored", 1, Some(&chain[2])).await.error(), (409, "host_fenced"));
    host.as_admin(Method::POST, "/unfence").await;
    let next = host.ticket("restored", 2, &chain[2]).await;
    let next = host.ticket("restored", 3, &next).await;
    // The machine of before was not gone after all.
    for (sequence, old) in (9..).zip(&chain[3..]) {
        assert_eq!(host.beat("a", sequence, Some(old)).await.error(), (409, "host_fenced"), "{old}");
    }
    host.ticket("restored", 4, &next).await;
    assert_eq!(host.replica.audited("host.unfence").await, 1);
    host.is_untouched().await;
}

/// Both have what was issued last, or shown last: that is as after a restart, until both have spoken.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_made_just_now_is_found_out_when_both_have_spoken() {
    for back in [0, 1] {
        let host = Host::new().await;
        let chain = host.chain("a", 4).await;
        let same = &chain[4 - back];
        let taken = host.ticket("copy", 1, same).await;
        assert_eq!(host.beat("a", 5, Some(&chain[4])).await.status, 200, "it may have been under way");
        host.ticket("copy", 2, &taken).await;
        host.later().await;
        assert_eq!(host.beat("a", 6, Some(&chain[4])).await.error(), (409, "host_fenced"), "{back}");
        assert_eq!(host.beat("copy", 3, Some(&taken)).await.error(), (409, "host_fenced"));
        assert_eq!(host.renew("127.0.0.1:2", Some(&taken)).await.error(), (409, "host_fenced"));
        assert_eq!(host.shown().await["status"], "fenced");
    }
}

/// A copy of the memory, too: the same process twice.
#[tokio::test(flavor = "multi_thread")]
async fn one_run_on_two_machines_is_found_out_by_its_tickets() {
    let host = Host::new().await;
    let chain = host.chain("a", 4).await;
    // It may have come late: then nobody hears the answer, and no alarm is raised.
    assert_eq!(host.says("failed", "a", 4, Some(&chain[2])).await.error(), (409, "host_fenced"));
    assert_eq!(host.replica.audited("host.fence").await, 0);
    assert_eq!(host.says("failed", "a", 5, Some(&chain[2])).await.error(), (409, "host_fenced"));
    assert_eq!(host.replica.audited("host.fence").await, 1);
    host.ticket("a", 5, &chain[4]).await;
    host.is_untouched().await;
}

/// Lost answers, deaths before the ticket is on the disk, and what comes late or twice.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_machine_may_say_never_fences_it() {
    let host = Host::new().await;
    // The first answer is lost, again and again.
    let first = host.ticket("a", 1, "").await;
    assert_eq!(host.ticket("a", 2, "").await, first);
    assert_eq!(host.ticket("b", 1, "").await, first, "and it was started again");
    let second = host.ticket("b", 2, &first).await;
    assert_eq!(host.ticket("b", 3, &first).await, second);
    // It died between the answer and the disk.
    assert_eq!(host.ticket("c", 1, &first).await, second);
    let third = host.ticket("c", 2, &second).await;
    let fourth = host.ticket("c", 3, &third).await;
    // Late, and twice: of this run, of one before, and of one that was never heard. Nobody waits for these answers.
    for (run, sequence, ticket, status) in [
        ("c", 1, &first, 409),
        ("c", 2, &second, 409),
        ("c", 3, &third, 200),
        ("b", 2, &first, 200),
        ("b", 4, &second, 200),
        ("b", 4, &second, 200),
    ] {
        let late = host.says("failed", run, sequence, Some(ticket)).await;
        assert_eq!(
            (late.status.as_u16(), &late.body["ticket"]),
            (status, &Value::Null),
            "{run} {sequence}: {}",
            late.body
        );
    }
    host.says("failed", "never", 1, Some(&first)).await;
    host.later().await;
    host.says("failed", "never", 1, Some(&first)).await;
    let fifth = host.ticket("c", 4, &fourth).await;
    // An agent of the version before, and the newer one again.
    let old = host.beat("old", 1, None).await;
    assert_eq!((old.status.as_u16(), &old.body["ticket"]), (200, &Value::Null));
    assert_eq!(host.beat("old", 2, None).await.status, 200);
    assert_eq!(host.renew("127.0.0.1:1", None).await.status, 200);
    let sixth = host.ticket("d", 1, &fifth).await;

    // Two replicas hear it at the same time.
    let (_other, url) = host.replica.another().await;
    let mut held = sixth;
    for sequence in (2..40).step_by(2) {
        let (one, two) = tokio::join!(
            host.says_to(&host.replica.url, "running", "d", sequence, Some(&held)),
            host.says_to(&url, "running", "d", sequence + 1, Some(&held))
        );
        assert_eq!((one.status.as_u16(), two.status.as_u16()), (200, 200), "{} {}", one.body, two.body);
        // Whichever answer it hears: the later one was taken in, and brings the ticket that was issued.
        held = two.body["ticket"].as_str().unwrap().to_owned();
        assert!(one.body["ticket"].is_null() || one.body["ticket"] == held.as_str(), "{} {}", one.body, two.body);
    }
    host.is_untouched().await;
    assert_eq!(host.replica.audited("host.fence").await, 0);
    assert_eq!(host.shown().await["copy_heard_at"], Value::Null);
}

/// The database is older than the host: its tickets are later ones than any that is known. A copy is older than both.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_database_follows_its_hosts() {
    let host = Host::new().await;
    let chain = host.chain("a", 6).await;
    let row = host.replica.database.sql("select ticket_issued, ticket_shown from hosts").await;
    assert_eq!(row.trim(), "6|5");
    // As it was after the second, and the fifth comes.
    host.replica.database.sql("update hosts set ticket_issued = 2, ticket_shown = 1, heartbeat_sequence = 2").await;
    let next = host.ticket("a", 7, &chain[5]).await;
    assert_eq!(next, chain[6]);
    assert_eq!(host.beat("copy", 1, Some(&chain[3])).await.error(), (409, "host_fenced"));
    host.ticket("a", 8, &next).await;
    // As it was when there were none yet.
    host.replica.database.sql("update hosts set ticket_issued = 0, ticket_shown = null, agent_run = 'before'").await;
    host.ticket("a", 9, &next).await;
    host.is_untouched().await;
}

/// What nobody was given is as old as can be; what cannot be a ticket is told.
#[tokio::test(flavor = "multi_thread")]
async fn tickets_cannot_be_made_up() {
    let host = Host::new().await;
    let (other, key) = (host.replica.host(4096).await, &host.replica.serving.app.tokens);
    let chain = host.chain("a", 3).await;
    let (_, seal) = chain[3].split_once('.').unwrap();
    for wrong in [
        String::new(),
        "x".to_owned(),
        ".".to_owned(),
        "9".to_owned(),
        "9.".to_owned(),
        format!("9.{seal}"),
        format!("9223372036854775807.{seal}"),
        key.ticket(other, 9),
        chain[3].replace(seal, &seal[..62]),
    ] {
        assert_eq!(host.beat("forger", 1, Some(&wrong)).await.error(), (409, "host_fenced"), "{wrong}");
        assert_eq!(host.renew("127.0.0.1:2", Some(&wrong)).await.error(), (409, "host_fenced"), "{wrong}");
    }
    let long = "1".repeat(200);
    assert_eq!(host.beat("forger", 1, Some(&long)).await.error(), (400, "invalid_request"));
    assert_eq!(host.renew("127.0.0.1:2", Some(&long)).await.error(), (400, "invalid_request"));
    host.ticket("a", 4, &chain[3]).await;
    host.is_untouched().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_fenced_while_it_was_emptied_is_emptied_on() {
    let host = Host::new().await;
    host.as_admin(Method::POST, "/drain").await;
    for (run, sequence) in [("a", 1), ("b", 1), ("a", 2)] {
        assert_eq!(host.beat(run, sequence, None).await.status, 200);
    }
    host.later().await;
    assert_eq!(host.beat("a", 3, None).await.error(), (409, "host_fenced"));
    let shown = host.shown().await;
    assert_eq!((&shown["status"], &shown["is_draining"]), (&json!("fenced"), &json!(true)));
    assert_eq!(host.as_admin(Method::POST, "/unfence").await["status"], "draining");
    assert_eq!(host.beat("a", 4, None).await.status, 200);
    assert_eq!(host.as_admin(Method::POST, "/undrain").await["status"], "online");
}
