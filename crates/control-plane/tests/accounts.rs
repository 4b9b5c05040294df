//! Accounts: how people come in, prove who they are, and are put out again.

mod replica;

use std::time::{Duration, Instant};

use replica::{Answer, Replica, Who};
use reqwest::Method;
use serde_json::{Value, json};

const PASSWORD: &str = "correct horse";

impl Replica {
    async fn post(&self, path: &str, body: Value) -> Answer {
        self.call(Who::Nobody, Method::POST, path, Some(body)).await
    }

    async fn login(&self, email: &str, password: &str) -> Answer {
        self.post("/v1/auth/login", json!({"email": email, "password": password})).await
    }

    async fn sign_up(&self, email: &str) -> Answer {
        self.post("/v1/auth/signup", json!({"email": email, "password": PASSWORD, "name": "Ada"})).await
    }

    async fn id_of(&self, email: &str) -> String {
        let users = self.as_admin(Method::GET, "/v1/admin/users", None).await;
        let all = users.body["users"].as_array().unwrap();
        all.iter().find(|user| user["email"] == email).expect(email)["id"].as_str().unwrap().to_owned()
    }

    /// What an administrator hands on.
    async fn link(&self, email: &str) -> Value {
        let path = format!("/v1/admin/users/{}/link", self.id_of(email).await);
        let answer = self.as_admin(Method::POST, &path, None).await;
        assert_eq!(answer.status, 201, "{}", answer.body);
        answer.body
    }

    /// Somebody who may log in with [`PASSWORD`]; the answer to the activation.
    async fn account(&self, email: &str) -> Value {
        let signed_up = self.sign_up(email).await;
        assert_eq!(signed_up.status, 201, "{}", signed_up.body);
        let link = self.link(email).await;
        let active = self.post("/v1/auth/activate", json!({"token": link["token"]})).await;
        assert_eq!(active.status, 200, "{}", active.body);
        active.body
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_signs_up_is_in_when_the_link_was_followed() {
    let replica = Replica::start().await;
    let made = replica.sign_up(" Ada@Example.org").await;
    assert_eq!(made.status, 201, "{}", made.body);
    assert!(made.body["message"].is_string());
    assert_eq!(replica.login("ada@example.org", PASSWORD).await.error(), (403, "account_not_activated"));
    assert_eq!(replica.login("ada@example.org", "wrong horse").await.error(), (401, "unauthorized"));
    assert_eq!(replica.sign_up("ada@example.org").await.error(), (409, "signup_cooldown"));
    let link = replica.link("ada@example.org").await;
    assert_eq!(link["purpose"], "activation");
    assert!(link["url"].as_str().unwrap().ends_with(&format!("/activate#token={}", link["token"].as_str().unwrap())));
    let token = json!({"token": link["token"]});
    let active = replica.post("/v1/auth/activate", token.clone()).await;
    assert_eq!(active.status, 200, "{}", active.body);
    for field in ["token", "user_id", "team_id", "email", "name"] {
        assert!(active.body[field].is_string(), "{field}: {}", active.body);
    }
    let session = active.body["token"].as_str().unwrap();
    let me = replica.call(Who::Bearer(session), Method::GET, "/v1/me", None).await;
    assert_eq!(
        (&me.body["name"], &me.body["role"], &me.body["has_password"]),
        (&json!("Ada"), &json!("owner"), &json!(true))
    );
    assert_eq!(me.body["providers"], json!([]));
    let teams = replica.call(Who::Bearer(session), Method::GET, "/v1/teams", None).await;
    assert_eq!(teams.body[0]["name"], "Ada's Team");
    assert_eq!(replica.post("/v1/auth/activate", token).await.error(), (400, "already_activated"));
    assert_eq!(replica.sign_up("ada@example.org").await.error(), (409, "email_taken"));
    assert_eq!(replica.login("ADA@example.org", PASSWORD).await.status, 200);
    for action in ["user.create", "user.activate", "user.link", "session.open"] {
        assert!(replica.audited(action).await > 0, "{action}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_input_is_refused_with_its_field() {
    let replica = Replica::start().await;
    let good = json!({"email": "a@example.org", "password": PASSWORD, "name": "Ada"});
    let long = "x".repeat(2000);
    for (field, wrong) in [
        ("email", json!("a")),
        ("email", json!("a@b\r\nBcc: c@d")),
        ("email", json!(format!("{long}@b"))),
        ("password", json!("1234567")),
        ("password", json!("         ")),
        ("password", json!(long)),
        ("name", json!("")),
        ("name", json!("a\u{202e}b")),
        ("name", json!("x".repeat(101))),
        ("name", json!(7)),
    ] {
        let mut body = good.clone();
        body[field] = wrong;
        let answer = replica.post("/v1/auth/signup", body).await;
        assert_eq!(
            (answer.error(), &answer.body["error"]["details"]["field"]),
            ((400, "invalid_request"), &json!(field))
        );
    }
    for token in ["", "x", &"0".repeat(64), &"A".repeat(64)] {
        let activated = replica.post("/v1/auth/activate", json!({ "token": token })).await;
        assert_eq!(activated.error(), (400, "invalid_token"), "{token}");
        let confirm = json!({"token": token, "new_password": PASSWORD});
        assert_eq!(replica.post("/v1/me/password/reset/confirm", confirm).await.error(), (400, "invalid_token"));
    }
    // A link of one kind does not do for the other, and none after its time.
    replica.sign_up("a@example.org").await;
    let link = replica.link("a@example.org").await;
    let confirm = json!({"token": link["token"], "new_password": "another horse"});
    assert_eq!(replica.post("/v1/me/password/reset/confirm", confirm).await.error(), (400, "invalid_token"));
    replica.database.sql("update account_tokens set expires_at = now()").await;
    assert_eq!(
        replica.post("/v1/auth/activate", json!({"token": link["token"]})).await.error(),
        (400, "invalid_token")
    );
    // Whose link ran out may sign up again.
    assert_eq!(replica.sign_up("a@example.org").await.status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_password_ends_what_the_old_one_opened() {
    let replica = Replica::start().await;
    let first = replica.account("a@example.org").await;
    let first = first["token"].as_str().unwrap();
    let second = replica.login("a@example.org", PASSWORD).await;
    let second = second.body["token"].as_str().unwrap();
    let change = |body: Value| replica.call(Who::Bearer(second), Method::POST, "/v1/me/password", Some(body));
    let wrong = change(json!({"current_password": "no", "new_password": "another horse"})).await;
    assert_eq!(wrong.error(), (401, "wrong_password"));
    let same = change(json!({"new_password": "another horse"})).await;
    assert_eq!(same.error(), (400, "invalid_request"));
    assert_eq!(change(json!({"current_password": PASSWORD, "new_password": "another horse"})).await.status, 204);
    let me = async |token: &str| replica.call(Who::Bearer(token), Method::GET, "/v1/me", None).await.status;
    assert_eq!(me(second).await, 200, "the one that asked goes on");
    assert_eq!(me(first).await, 401);
    assert_eq!(replica.login("a@example.org", PASSWORD).await.error(), (401, "unauthorized"));
    // By mail: the answer is the same for known and unknown addresses, and is given before the link is made.
    let links = replica.audited("user.link").await;
    for email in ["a@example.org", "nobody@example.org"] {
        assert_eq!(replica.post("/v1/me/password/reset", json!({ "email": email })).await.status, 204);
    }
    let began = Instant::now();
    while replica.audited("user.link").await == links {
        assert!(began.elapsed() < Duration::from_secs(30), "the link for the address that is known");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let link = replica.link("a@example.org").await;
    assert_eq!(link["purpose"], "password_reset");
    let confirm = json!({"token": link["token"], "new_password": "third horse"});
    assert_eq!(replica.post("/v1/me/password/reset/confirm", confirm.clone()).await.status, 204);
    assert_eq!(replica.post("/v1/me/password/reset/confirm", confirm).await.error(), (400, "invalid_token"), "once");
    assert_eq!(me(second).await, 401);
    assert_eq!(replica.login("a@example.org", "third horse").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_seen_and_ended() {
    let replica = Replica::start().await;
    replica.account("a@example.org").await;
    let login = replica.login("a@example.org", PASSWORD).await;
    let token = login.body["token"].as_str().unwrap();
    let listed = replica.call(Who::Bearer(token), Method::GET, "/v1/me/sessions", None).await;
    let (mine, others): (Vec<&Value>, Vec<&Value>) =
        listed.body.as_array().unwrap().iter().partition(|session| session["current"] == true);
    assert_eq!((mine.len(), others.len()), (1, 1), "{}", listed.body);
    let path = format!("/v1/me/sessions/{}", others[0]["id"].as_str().unwrap());
    assert_eq!(replica.call(Who::Bearer(token), Method::DELETE, &path, None).await.status, 204);
    assert_eq!(replica.call(Who::Bearer(token), Method::DELETE, &path, None).await.error(), (404, "not_found"));
    assert_eq!(replica.call(Who::Bearer(token), Method::POST, "/v1/auth/logout", None).await.status, 204);
    assert_eq!(replica.call(Who::Bearer(token), Method::GET, "/v1/me", None).await.error(), (401, "unauthorized"));
    let renamed = replica.login("a@example.org", PASSWORD).await.body["token"].as_str().unwrap().to_owned();
    let body = Some(json!({"name": "Grace"}));
    let renamed = replica.call(Who::Bearer(&renamed), Method::PATCH, "/v1/me", body).await;
    assert_eq!((renamed.status.as_u16(), &renamed.body["name"]), (200, &json!("Grace")), "{}", renamed.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browsers_cookie_alone_changes_nothing() {
    let replica = Replica::start().await;
    replica.account("a@example.org").await;
    let body = json!({"email": "a@example.org", "password": PASSWORD, "cookie": true});
    let login = replica.post("/v1/auth/login", body).await;
    assert!(login.body.get("token").is_none(), "no script reads it: {}", login.body);
    let set = login.headers["set-cookie"].to_str().unwrap().to_owned();
    assert!(set.contains("HttpOnly") && set.contains("SameSite=Lax"), "{set}");
    let cookie = set.split(';').next().unwrap().to_owned();
    let csrf = login.body["csrf_token"].as_str().unwrap().to_owned();
    let ask = |method: Method, path: &str, csrf: Option<&str>| {
        let request = replica.http.request(method, format!("{}{path}", replica.url)).header("cookie", &cookie);
        let request = match csrf {
            Some(csrf) => request.header("x-csrf-token", csrf),
            None => request,
        };
        replica.send(Who::Nobody, request.json(&json!({"name": "k"})))
    };
    let me = ask(Method::GET, "/v1/me", None).await;
    assert_eq!((me.status.as_u16(), &me.body["csrf_token"]), (200, &json!(csrf)));
    assert_eq!(ask(Method::GET, "/v1/sandboxes", None).await.status, 200);
    for wrong in [None, Some(""), Some("0"), Some(&csrf[1..])] {
        assert_eq!(ask(Method::POST, "/v1/api-keys", wrong).await.error(), (403, "forbidden"), "{wrong:?}");
    }
    assert_eq!(ask(Method::POST, "/v1/api-keys", Some(&csrf)).await.status, 201);
    // Another site's page opens a WebSocket: the browser sends the cookie, and says where the page is from.
    for origin in [None, Some("null"), Some("https://evil.example"), Some("http://localhost:8000.evil.example")] {
        let url = format!("{}/v1/sandboxes/sb0000000000000000000000/exec/stream", replica.url);
        let mut request = replica.http.get(url).header("cookie", &cookie).header("connection", "upgrade");
        request = request.header("upgrade", "websocket").header("sec-websocket-version", "13");
        request = request.header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
        if let Some(origin) = origin {
            request = request.header("origin", origin);
        }
        assert_eq!(replica.send(Who::Nobody, request).await.error(), (403, "forbidden"), "{origin:?}");
    }
    // A header goes before the cookie, which nobody chose to send.
    let request = replica.http.get(format!("{}/v1/me", replica.url)).header("cookie", &cookie);
    assert_eq!(replica.send(Who::Bearer("x.y.z"), request).await.error(), (401, "unauthorized"));
    let out = ask(Method::POST, "/v1/auth/logout", Some(&csrf)).await;
    assert_eq!(out.status, 204);
    assert!(out.headers["set-cookie"].to_str().unwrap().contains("Max-Age=0"));
    assert_eq!(ask(Method::GET, "/v1/me", None).await.error(), (401, "unauthorized"));
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_cannot_be_guessed() {
    let replica = Replica::start().await;
    replica.account("a@example.org").await;
    for email in ["a@example.org", "nobody@example.org"] {
        let mut answers = Vec::new();
        for _ in 0..22 {
            answers.push(replica.login(email, "wrong horse").await);
        }
        let codes: Vec<&str> = answers.iter().map(Answer::code).collect();
        assert_eq!(codes[..20], ["unauthorized"; 20], "{email}");
        assert_eq!(codes[20..], ["rate_limited"; 2], "{email}");
        assert!(answers[21].headers["retry-after"].to_str().unwrap().parse::<u32>().unwrap() <= 300);
    }
    assert_eq!(replica.login("a@example.org", PASSWORD).await.code(), "rate_limited", "also with the right one");
    replica.database.sql("update attempts set window_ends_at = now() - interval '1 s'").await;
    assert_eq!(replica.login("a@example.org", PASSWORD).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn sign_up_may_be_closed() {
    let database = testkit::postgres::Database::new().await;
    let replica = Replica::closed(database).await;
    assert_eq!(replica.sign_up("a@example.org").await.error(), (403, "forbidden"));
    // An administrator makes the account; its person sets the password.
    let body = json!({"email": "A@example.org", "name": "Ada"});
    let made = replica.as_admin(Method::POST, "/v1/admin/users", Some(body.clone())).await;
    assert_eq!(made.status, 201, "{}", made.body);
    let token = made.body["token"].clone();
    let none = replica.post("/v1/auth/activate", json!({ "token": token })).await;
    assert_eq!((none.error(), &none.body["error"]["details"]["field"]), ((400, "invalid_request"), &json!("password")));
    let active = replica.post("/v1/auth/activate", json!({"token": token, "password": PASSWORD})).await;
    assert_eq!(active.status, 200, "{}", active.body);
    assert_eq!(replica.login("a@example.org", PASSWORD).await.status, 200);
    assert_eq!(replica.as_admin(Method::POST, "/v1/admin/users", Some(body)).await.error(), (409, "email_taken"));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_put_out_is_out_at_once() {
    let replica = Replica::start().await;
    let account = replica.account("a@example.org").await;
    let token = account["token"].as_str().unwrap();
    let key = replica.call(Who::Bearer(token), Method::POST, "/v1/api-keys", Some(json!({}))).await;
    let key = key.body["key"].as_str().unwrap();
    let path = format!("/v1/admin/users/{}/active", account["user_id"].as_str().unwrap());
    let set = |active: bool| replica.as_admin(Method::PUT, &path, Some(json!({ "active": active })));
    assert_eq!(replica.call(Who::Key(key), Method::GET, "/v1/sandboxes", None).await.status, 200);
    assert_eq!(set(false).await.status, 204);
    assert_eq!(replica.call(Who::Bearer(token), Method::GET, "/v1/me", None).await.error(), (401, "unauthorized"));
    assert_eq!(replica.call(Who::Key(key), Method::GET, "/v1/sandboxes", None).await.error(), (401, "unauthorized"));
    assert_eq!(replica.login("a@example.org", PASSWORD).await.error(), (403, "account_disabled"));
    assert_eq!(set(true).await.status, 204);
    assert_eq!(replica.call(Who::Bearer(token), Method::GET, "/v1/me", None).await.error(), (401, "unauthorized"));
    assert_eq!(replica.login("a@example.org", PASSWORD).await.status, 200);
    // Nobody puts themselves out, and the last administrator stays one.
    let own = replica.as_admin(Method::GET, "/v1/me", None).await.body["user_id"].as_str().unwrap().to_owned();
    let refused =
        replica.as_admin(Method::PUT, &format!("/v1/admin/users/{own}/active"), Some(json!({"active": false}))).await;
    assert_eq!(refused.error(), (400, "invalid_request"));
    let refused =
        replica.as_admin(Method::PUT, &format!("/v1/admin/users/{own}/admin"), Some(json!({"admin": false}))).await;
    assert_eq!(refused.error(), (409, "conflict"));
    let unknown = format!("/v1/admin/users/{}/active", model::ids::UserId(uuid::Uuid::nil()));
    assert_eq!(
        replica.as_admin(Method::PUT, &unknown, Some(json!({"active": true}))).await.error(),
        (404, "not_found")
    );
}

/// A call that waits for a host that nobody answers for, by somebody who is put out meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_open_ends_with_the_rights() {
    let replica = Replica::start().await;
    let host = replica.host(4096).await;
    let sandbox = replica.sandbox(host).await;
    let team = replica.team().await;
    replica.database.sql(&format!("update sandboxes set team_id = '{}'", team.id.0)).await;
    let began = Instant::now();
    let wait = async {
        let request = replica.http.delete(format!("{}/v1/sandboxes/{sandbox}?wait_sec=100", replica.url));
        replica.send(Who::Bearer(&team.member.token), request.timeout(Duration::from_secs(120))).await
    };
    let put_out = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let path = format!("/v1/teams/{}/members/{}", team.id, team.member.id);
        assert_eq!(replica.as_person(&team.owner, Method::DELETE, &path, None).await.status, 204);
    };
    let (answer, ()) = tokio::join!(wait, put_out);
    assert_eq!(answer.error(), (401, "unauthorized"));
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    let after = replica.as_person(&team.member, Method::GET, "/v1/sandboxes", None).await;
    assert_eq!(after.error(), (403, "no_team"));
    let wish = replica.database.sql("select desired from sandboxes").await;
    assert_eq!(wish.trim(), "killed", "what was wished before goes on");
}
