//! Mail: it reaches its server whatever dies on the way, by TLS where that is asked for, and is not tried for ever.

mod replica;
mod smtp;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use control_plane::account_settings::AccountSettings;
use control_plane::mail::Security;
use replica::{Replica, Who};
use reqwest::Method;
use serde_json::{Value, json};
use smtp::{Server, Verdict};
use testkit::postgres::Database;
use tokio::process::{Child, Command};

const TIME_MAX: Duration = Duration::from_secs(60);

fn settings(server: &Server) -> AccountSettings {
    AccountSettings {
        signup: Some("open".to_owned()),
        smtp_host: Some("localhost".to_owned()),
        smtp_port: Some(server.port),
        smtp_security: Some(server.security),
        smtp_from: Some("Wrenn <wrenn@example.org>".to_owned()),
        ..AccountSettings::default()
    }
}

impl Replica {
    async fn sign_up(&self, email: &str) {
        let body = json!({"email": email, "password": "correct horse", "name": "Ada"});
        let made = self.call(Who::Nobody, Method::POST, "/v1/auth/signup", Some(body)).await;
        assert_eq!(made.status, 201, "{}", made.body);
    }

    /// One row of the outbox.
    async fn outgoing(&self) -> String {
        let columns = "attempts, given_up_at is not null, length(sealed) = 0, coalesce(problem, '')";
        self.database.sql(&format!("select {columns} from outbox")).await.trim().to_owned()
    }
}

/// The token of the link in a mail.
fn token(mail: &str) -> String {
    // Long lines are folded by a quoted line end.
    let whole = mail.replace("=\r\n", "").replace("=3D", "=");
    let at = whole.find("#token=").unwrap_or_else(|| panic!("no link: {mail}"));
    whole[at + 7..].chars().take(64).collect()
}

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < TIME_MAX, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_comes_by_mail_over_every_kind_of_connection() {
    for security in [Security::None, Security::Starttls, Security::Tls] {
        let mut server = Server::start(security).await;
        let trusted = (security != Security::None).then(|| server.certificate_file.clone());
        let replica = Replica::with_accounts(AccountSettings { smtp_ca_file: trusted, ..settings(&server) }).await;
        replica.sign_up("ada@example.org").await;
        let mail = server.mail(TIME_MAX).await;
        for part in
            ["MAIL FROM:<wrenn@example.org>", "RCPT TO:<ada@example.org>", "Subject: Activate your Wrenn account"]
        {
            assert!(mail.contains(part), "{security:?} {part}: {mail}");
        }
        let body = json!({"token": token(&mail)});
        let active = replica.call(Who::Nobody, Method::POST, "/v1/auth/activate", Some(body)).await;
        assert_eq!(active.status, 200, "{}", active.body);
        until("the row goes", async || replica.outgoing().await.is_empty().then_some(())).await;
        assert_eq!(server.plain_secrets(), 0, "{security:?}: nothing of the mail was said before TLS");
    }
}

/// Whoever stands between is not told the link.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_nobody_vouches_for_gets_nothing() {
    for security in [Security::Starttls, Security::Tls] {
        let mut server = Server::start(security).await;
        let replica = Replica::with_accounts(settings(&server)).await;
        replica.sign_up("ada@example.org").await;
        until("a try", async || (replica.outgoing().await.starts_with("1|f")).then_some(())).await;
        until("a second try", async || (replica.outgoing().await.starts_with("2|f")).then_some(())).await;
        assert!(server.nothing_came(), "{security:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_for_now_is_tried_again_and_what_is_refused_for_good_is_not() {
    let mut server = Server::start(Security::None).await;
    let replica = Replica::with_accounts(settings(&server)).await;
    server.next([Verdict::Recipient("451 4.7.1 later"), Verdict::Data("452 4.3.1 full"), Verdict::Take]);
    replica.sign_up("ada@example.org").await;
    let mail = server.mail(TIME_MAX).await;
    assert!(mail.contains("#token") || mail.contains("#token=3D"), "{mail}");
    assert_eq!(server.conversations(), 3);
    until("the row goes", async || replica.outgoing().await.is_empty().then_some(())).await;

    server.next([Verdict::Recipient("550 5.1.1 nobody")]);
    replica.sign_up("nobody@example.org").await;
    let row = until("given up", async || Some(replica.outgoing().await).filter(|row| row.starts_with("1|t"))).await;
    assert!(row.starts_with("1|t|t|") && row.contains("nobody"), "without the link, with the server's words: {row}");
    replica.database.sql("delete from outbox").await;

    // Credentials that are wrong are the operator's to mend: the mail waits for that.
    server.next([Verdict::Greeting("535 5.7.8 who are you")]);
    replica.sign_up("grace@example.org").await;
    let mail = server.mail(TIME_MAX).await;
    assert!(mail.contains("RCPT TO:<grace@example.org>"), "{mail}");

    // What came too late helps nobody.
    server.next([Verdict::Recipient("451 later")]);
    replica.sign_up("late@example.org").await;
    until("a try", async || (replica.outgoing().await.starts_with("1|f")).then_some(())).await;
    replica.database.sql("update outbox set expires_at = now(), next_at = now()").await;
    let row = until("given up", async || Some(replica.outgoing().await).filter(|row| row.contains("|t|t|"))).await;
    assert!(row.ends_with("its time was over"), "{row}");
}

/// A deliverer that has taken a mail and hangs keeps it for the time of its lease and no longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_deliverer_that_hangs_is_relieved() {
    let mut server = Server::start(Security::None).await;
    let replica = Replica::with_accounts(settings(&server)).await;
    server.next([Verdict::Hang]);
    replica.sign_up("ada@example.org").await;
    until("taken", async || (server.conversations() == 1).then_some(())).await;
    let (other, _) = replica.another().await;
    // Nobody else delivers what is taken.
    replica.sign_up("grace@example.org").await;
    assert!(server.mail(TIME_MAX).await.contains("grace@"));
    assert!(server.nothing_came());
    replica.database.sql("update outbox set lease_until = now() - interval '1 s'").await;
    let mail = server.mail(TIME_MAX).await;
    assert!(mail.contains("ada@"), "{mail}");
    until("the row goes", async || replica.outgoing().await.is_empty().then_some(())).await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_replicas_one_delivers_each_mail() {
    let mut server = Server::start(Security::None).await;
    let replica = Replica::with_accounts(settings(&server)).await;
    let (second, _) = replica.another().await;
    let (third, _) = replica.another().await;
    let emails: Vec<String> = (0..40).map(|n| format!("p{n}@example.org")).collect();
    // Written at once, as if no replica had been there.
    for chunk in emails.chunks(8) {
        futures::future::join_all(chunk.iter().map(|email| replica.sign_up(email))).await;
    }
    let mut came = Vec::new();
    for _ in &emails {
        let mail = server.mail(TIME_MAX).await;
        let to = mail.split("RCPT TO:<").nth(1).unwrap().split('>').next().unwrap().to_owned();
        came.push(to);
    }
    came.sort();
    let mut expected = emails.clone();
    expected.sort();
    assert_eq!(came, expected);
    until("the rows go", async || replica.outgoing().await.is_empty().then_some(())).await;
    assert!(server.nothing_came(), "each once");
    second.stop().await;
    third.stop().await;
}

/// A control plane as a program of its own, which can be killed.
async fn program(database: &Database, dir: &Path, server: &Server, crashpoints: &str) -> (Child, String) {
    let ready = dir.join("ready.json");
    let _ = std::fs::remove_file(&ready);
    let child = Command::new(env!("CARGO_BIN_EXE_wrenn-cp"))
        .arg("--ready-file")
        .arg(&ready)
        .current_dir(dir)
        .env("DATABASE_URL", &database.url)
        .env("WRENN_CP_LISTEN_ADDR", "127.0.0.1:0")
        .env("WRENN_DIR", dir)
        .env("WRENN_SIGNUP", "open")
        .env("WRENN_SMTP_HOST", "localhost")
        .env("WRENN_SMTP_PORT", server.port.to_string())
        .env("WRENN_SMTP_SECURITY", "none")
        .env("WRENN_SMTP_FROM", "wrenn@example.org")
        .env("WRENN_CRASHPOINTS", crashpoints)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let said = until("the program serves", async || {
        let text = std::fs::read_to_string(&ready).ok()?;
        serde_json::from_str::<Value>(&text).ok()
    })
    .await;
    (child, format!("http://{}", said["addr"].as_str().unwrap()))
}

/// Killed between commit and delivery, nothing is lost; between delivery and its being written down, the mail comes once more.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_control_plane_loses_no_mail() {
    let database = Database::new().await;
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(Security::None).await;
    let (mut child, url) = program(&database, dir.path(), &server, "cp.sign_up.written=abort").await;
    let body = json!({"email": "ada@example.org", "password": "correct horse", "name": "Ada"});
    let signed_up = reqwest::Client::new().post(format!("{url}/v1/auth/signup")).json(&body).send().await;
    assert!(signed_up.is_err(), "it was killed before it answered");
    child.wait().await.unwrap();
    assert!(server.nothing_came());
    let rows = async || database.sql("select attempts from outbox").await.trim().to_owned();
    assert_eq!(rows().await, "0");
    let (mut child, _) = program(&database, dir.path(), &server, "cp.outbox.delivered=abort").await;
    let first = server.mail(TIME_MAX).await;
    child.wait().await.unwrap();
    assert_eq!(rows().await, "1", "taken, and nobody has written down that it was delivered");
    database.sql("update outbox set lease_until = now() - interval '1 s'").await;
    let (mut child, _) = program(&database, dir.path(), &server, "").await;
    let second = server.mail(TIME_MAX).await;
    assert_eq!(token(&first), token(&second));
    until("the row goes", async || rows().await.is_empty().then_some(())).await;
    child.kill().await.unwrap();
}
