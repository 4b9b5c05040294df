//! Templates of the platform: built by a recipe, or made of a sandbox of the platform's team; all teams begin with them.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use whole_machine::crash_points::CrashPoints;
use whole_machine::platform::{Options, Platform};
use whole_machine::wait;

/// For a build of some commands, in an emulated guest on a busy machine.
const BUILD_LIMIT: Duration = Duration::from_secs(240);
const SOON: Duration = Duration::from_secs(60);
/// Writes again and again to where only memory keeps it.
const APP: &str = "while :; do echo tick >>/dev/shm/ticks; sleep 0.1; done\n";

fn platform(env: Options) -> Platform {
    Platform::start_with(&Options { pool_mib: Some(8192), ..env })
}

/// Who may everything.
struct Admin<'a> {
    platform: &'a Platform,
    token: String,
}

impl<'a> Admin<'a> {
    fn of(platform: &'a Platform) -> Self {
        let output = platform.wrenn(&["admin", "token"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { platform, token: String::from_utf8(output.stdout).unwrap().trim().to_owned() }
    }

    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.platform.http.request(method, format!("{}{path}", self.platform.api)).bearer_auth(&self.token)
    }

    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
        let request = self.request(method, path);
        answered(if let Some(body) = body { request.json(&body) } else { request }).await
    }

    async fn build(&self, config: Value) -> String {
        let (status, build) = self.call(Method::POST, "/v1/admin/builds", Some(config)).await;
        assert_eq!(status, 201, "{build}");
        build["id"].as_str().unwrap().to_owned()
    }

    /// What has become of it. The control plane may be away meanwhile.
    async fn ended(&self, id: &str) -> Value {
        wait::until("the build ends", BUILD_LIMIT, || async {
            let answer = self.request(Method::GET, &format!("/v1/admin/builds/{id}")).send().await.ok()?;
            let build: Value = answer.json().await.ok()?;
            (!matches!(build["status"].as_str()?, "pending" | "running")).then_some(build)
        })
        .await
    }

    async fn succeeded(&self, id: &str) -> Value {
        let build = self.ended(id).await;
        assert_eq!(build["status"], "success", "{build:#}");
        build
    }

    /// Sandboxes of the platform's team.
    async fn sandboxes(&self) -> usize {
        let (status, list) = self.call(Method::GET, "/v1/admin/capsules", None).await;
        assert_eq!(status, 200, "{list}");
        list.as_array().unwrap().len()
    }

    /// Nothing that was there for builds, or became a template, is left.
    async fn until_none(&self) {
        wait::until("the sandboxes of builds are gone", SOON, || async { (self.sandboxes().await == 0).then_some(()) })
            .await;
    }

    /// A key of a team that is not the platform's.
    async fn key_of_a_team(&self) -> String {
        let (status, team) = self.call(Method::POST, "/v1/teams", Some(json!({"name": "others"}))).await;
        assert_eq!(status, 201, "{team}");
        let body = json!({"team_id": team["id"]});
        let (status, session) = self.call(Method::POST, "/v1/auth/switch-team", Some(body)).await;
        assert_eq!(status, 200, "{session}");
        let theirs = Admin { platform: self.platform, token: session["token"].as_str().unwrap().to_owned() };
        let (status, key) = theirs.call(Method::POST, "/v1/api-keys", Some(json!({}))).await;
        assert_eq!(status, 201, "{key}");
        key["key"].as_str().unwrap().to_owned()
    }
}

async fn answered(request: reqwest::RequestBuilder) -> (u16, Value) {
    let answer = request.send().await.unwrap();
    let status = answer.status();
    let text = answer.text().await.unwrap();
    (status.as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// A user of another team.
struct User<'a> {
    platform: &'a Platform,
    key: String,
}

impl User<'_> {
    async fn call(&self, method: Method, path: &str, body: Value) -> (u16, Value) {
        let url = format!("{}{path}", self.platform.api);
        answered(self.platform.http.request(method, url).header("X-API-Key", &self.key).json(&body)).await
    }

    async fn create(&self, template: &str) -> String {
        let body = json!({"template": template, "envs": {"OWN": "1"}});
        let (status, sandbox) = self.call(Method::POST, "/v1/sandboxes?wait_sec=110", body).await;
        assert_eq!(status, 201, "{sandbox}");
        sandbox["id"].as_str().unwrap().to_owned()
    }

    async fn shell(&self, id: &str, script: &str) -> String {
        let body = json!({"cmd": "/bin/sh", "args": ["-c", script], "timeout_sec": 60});
        let (status, ran) = self.call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), body).await;
        assert_eq!((status, &ran["exit_code"]), (200, &json!(0)), "{ran}");
        ran["stdout"].as_str().unwrap().to_owned()
    }

    async fn kill(&self, id: &str) {
        let (status, answer) = self.call(Method::DELETE, &format!("/v1/sandboxes/{id}"), json!({})).await;
        assert_eq!(status, 204, "{answer}");
    }
}

/// `app.sh` and a directory, packed.
fn archive() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("app.sh"), APP).unwrap();
    std::fs::create_dir(dir.path().join("conf")).unwrap();
    std::fs::write(dir.path().join("conf/port"), "8080\n").unwrap();
    let locked = std::fs::Permissions::from_mode(0o700);
    for (place, file) in [("etc/inner", "etc/inner/file"), ("lib", "lib/extra")] {
        std::fs::create_dir_all(dir.path().join(place)).unwrap();
        std::fs::write(dir.path().join(file), "").unwrap();
        std::fs::set_permissions(dir.path().join(place), locked.clone()).unwrap();
    }
    std::fs::set_permissions(dir.path().join("etc"), locked.clone()).unwrap();
    std::fs::set_permissions(dir.path(), locked).unwrap();
    let packed = Command::new("tar").args(["-cz", "-C"]).arg(dir.path()).arg(".").output().unwrap();
    assert!(packed.status.success());
    packed.stdout
}

fn form(config: &Value, archive: Vec<u8>) -> reqwest::multipart::Form {
    let file = reqwest::multipart::Part::bytes(archive).file_name("files.tar.gz");
    reqwest::multipart::Form::new().text("config", config.to_string()).part("archive", file)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recipe_becomes_a_template_for_all_teams() {
    let platform = platform(Options::default());
    let before = platform.objects();
    let admin = Admin::of(&platform);
    let recipe = |greeting: &str| {
        json!([
            "ENV APP=web",
            format!("ENV GREETING={greeting}-$APP"),
            "USER web",
            "WORKDIR /srv/app",
            "COPY app.sh conf ./",
            "COPY conf/port app.sh renamed/",
            "COPY app.sh renamed/other.sh",
            "COPY . /",
            "COPY etc/inner/ /etc",
            "RUN --timeout=1m echo $GREETING >greeting; id -un; pwd; sudo -n id -un; head -c 200000 /dev/zero | tr '\\0' x >&2",
            "START exec sh ./app.sh",
        ])
    };
    let config = json!({"name": "app", "recipe": recipe("hello"), "skip_pre_post": true, "vcpus": 2, "memory_mb": 256,
        "healthcheck": "--interval=200ms --retries=100 test -s /dev/shm/ticks"});
    let request = || {
        let request = admin.request(Method::POST, "/v1/admin/builds").header("Idempotency-Key", "first");
        request.multipart(form(&config, archive()))
    };
    let (status, build) = answered(request()).await;
    assert_eq!(status, 201, "{build}");
    let id = build["id"].as_str().unwrap();
    // Sent again, it is the same one.
    let (status, again) = answered(request()).await;
    assert_eq!((status, &again["id"]), (201, &build["id"]), "{again}");
    let build = admin.succeeded(id).await;
    assert_eq!((&build["current_step"], &build["total_steps"]), (&json!(12), &json!(12)), "{build:#}");
    assert_eq!(
        (&build["default_user"], &build["default_env"]),
        (&json!("web"), &json!({"APP": "web", "GREETING": "hello-web"}))
    );
    let phases: Vec<&str> =
        build["logs"].as_array().unwrap().iter().map(|log| log["phase"].as_str().unwrap()).collect();
    assert_eq!(phases, [vec!["recipe"; 11], vec!["healthcheck"]].concat());
    let ran = &build["logs"][9];
    assert_eq!((&ran["stdout"], &ran["exit"], &ran["ok"]), (&json!("web\n/srv/app\nroot\n"), &json!(0), &json!(true)));
    assert_eq!(ran["stderr"].as_str().unwrap().len(), 64 * 1024);
    let (_, list) = admin.call(Method::GET, "/v1/admin/builds", None).await;
    assert_eq!((&list[0]["id"], &list[0]["logs"]), (&build["id"], &json!([])), "{list}");
    admin.until_none().await;

    // A team that has nothing to do with the platform's begins with it: what was started goes on, whose it was and in its environment.
    let user = User { platform: &platform, key: admin.key_of_a_team().await };
    let sandbox = user.create("app").await;
    // What is there already stays whose and what it is, when a tree is copied over it.
    let said = "id -un; echo $APP $GREETING $OWN; cat /srv/app/greeting /srv/app/conf/port; stat -c %U /srv/app /srv/app/app.sh \
                /srv/app/conf/port; ls /srv/app/renamed; stat -c '%U %a' / /etc /etc/inner /etc/inner/file /lib/extra; test -L /lib && echo link; a=$(wc -c </dev/shm/ticks); sleep 2; test $(wc -c </dev/shm/ticks) -gt $a && echo on; \
                ls /tmp/build-files* 2>/dev/null; nproc";
    let wanted = "web\nweb hello-web 1\nhello-web\n8080\nweb\nweb\nweb\napp.sh\nother.sh\nport\nroot 755\nroot 755\n\
                  web 700\nweb 644\nweb 644\nlink\non\n2\n";
    assert_eq!(user.shell(&sandbox, said).await, wanted);
    let (_, seen) = user.call(Method::GET, "/v1/snapshots?type=snapshot", json!({})).await;
    assert_eq!(
        (&seen[0]["name"], &seen[0]["platform"], &seen[0]["memory_mb"]),
        (&json!("app"), &json!(true), &json!(256))
    );
    let (status, refused) = user.call(Method::DELETE, "/v1/snapshots/app", json!({})).await;
    assert_eq!((status, &refused["error"]["code"]), (403, &json!("forbidden")));
    let own = json!({"sandbox_id": sandbox, "name": "app"});
    let (status, refused) = user.call(Method::POST, "/v1/snapshots", own).await;
    assert_eq!((status, &refused["error"]["code"]), (409, &json!("name_reserved")));

    // Built anew, it takes its own name's place; what began with the old one lives on.
    // Its eleventh step starts a process, as that of the base did, which runs on.
    let mut recipe = vec!["RUN echo anew >/srv/app/greeting".to_owned()];
    recipe.extend((2..11).map(|step| format!("ENV STEP={step}")));
    recipe.push("START touch /dev/shm/second; exec sleep 3600".to_owned());
    let config = json!({"name": "app", "base_template": "app", "recipe": recipe, "skip_pre_post": true});
    admin.succeeded(&admin.build(config).await).await;
    let (_, seen) = user.call(Method::GET, "/v1/snapshots?type=snapshot", json!({})).await;
    assert_eq!(seen.as_array().map(Vec::len), Some(1), "{seen}");
    let newer = user.create("app").await;
    let said = "cat /srv/app/greeting; id -un; echo $APP $STEP; sleep 1; ls /dev/shm";
    assert_eq!(user.shell(&newer, said).await, "anew\nroot\nweb 10\nsecond\nticks\n");
    assert_eq!(user.shell(&sandbox, "cat /srv/app/greeting").await, "hello-web\n");

    // By hand: the same, and the end of it.
    let shown = String::from_utf8(platform.wrenn(&["admin", "template", "list"]).stdout).unwrap();
    assert!(shown.contains("app") && shown.contains("minimal"), "{shown}");
    let (status, _) = admin.call(Method::DELETE, "/v1/admin/templates/app", None).await;
    assert_eq!(status, 204);
    for (name, wanted) in [("app", 404), ("minimal", 403), ("..", 404), ("a%20b", 400)] {
        let (status, answer) = admin.call(Method::DELETE, &format!("/v1/admin/templates/{name}"), None).await;
        assert_eq!(status, wanted, "{name}: {answer}");
    }
    let (status, refused) = user.call(Method::POST, "/v1/sandboxes", json!({"template": "app"})).await;
    assert_eq!((status, &refused["error"]["code"]), (404, &json!("not_found")));
    assert_eq!(user.shell(&newer, "echo alive").await, "alive\n");
    user.kill(&sandbox).await;
    user.kill(&newer).await;
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_comes_to_nothing_says_why_and_leaves_nothing() {
    let platform = platform(Options::default());
    let before = platform.objects();
    let admin = Admin::of(&platform);
    let (status, kept) = admin
        .call(Method::POST, "/v1/admin/capsules?wait_sec=110", Some(json!({"template": "minimal", "memory_mb": 256})))
        .await;
    assert_eq!(status, 201, "{kept}");
    let path = format!("/v1/admin/capsules/{}/snapshot?wait_sec=110", kept["id"].as_str().unwrap());
    let (status, kept) = admin.call(Method::POST, &path, Some(json!({"name": "kept"}))).await;
    assert_eq!((status, &kept["platform"]), (201, &json!(true)), "{kept}");
    let bare = |recipe: Value| json!({"name": "kept", "recipe": recipe, "skip_pre_post": true, "memory_mb": 256});
    let with = |name: &str, value: Value| {
        let mut config = bare(json!(["RUN true"]));
        config[name] = value;
        config
    };
    for (config, why) in [
        (
            bare(json!(["RUN true", "RUN echo no >&2; exit 3", "RUN never"])),
            "step 2 (RUN echo no >&2; exit 3) ended with code 3",
        ),
        (bare(json!(["RUN --timeout=1s sleep 60"])), "did not end within 1 s"),
        (with("base_template", json!("nothing")), "there is no template nothing"),
        (
            with("healthcheck", json!("--interval=200ms --retries=3 false")),
            "step 2 (--interval=200ms --retries=3 false)",
        ),
    ] {
        let build = admin.ended(&admin.build(config).await).await;
        assert_eq!(build["status"], "failed", "{build:#}");
        assert!(build["error"].as_str().unwrap().contains(why), "{build:#}");
        assert!(build["completed_at"].is_string());
        let logs = build["logs"].as_array().unwrap();
        assert!(logs.iter().rev().skip(1).all(|log| log["ok"] == true), "{build:#}");
    }
    // What does not go on when nobody wants it any more.
    let id = admin.build(bare(json!(["RUN sleep 0.1", "RUN --timeout=10m sleep 500"]))).await;
    wait::until("the build is in its second step", BUILD_LIMIT, || async {
        let (_, build) = admin.call(Method::GET, &format!("/v1/admin/builds/{id}"), None).await;
        (build["current_step"] == 1).then_some(())
    })
    .await;
    let cancel = format!("/v1/admin/builds/{id}/cancel");
    assert_eq!(admin.call(Method::POST, &cancel, None).await.0, 204);
    assert_eq!(admin.ended(&id).await["status"], "cancelled");
    let (status, refused) = admin.call(Method::POST, &cancel, None).await;
    assert_eq!((status, &refused["error"]["code"]), (400, &json!("invalid_request")));
    admin.until_none().await;

    // What was there is there still, and nothing else is.
    let (_, templates) = admin.call(Method::GET, "/v1/admin/templates", None).await;
    let built: Vec<&Value> = templates.as_array().unwrap().iter().filter(|it| it["type"] == "snapshot").collect();
    assert_eq!(built.len(), 1, "{templates}");
    assert_eq!((&built[0]["name"], &built[0]["created_at"]), (&json!("kept"), &kept["created_at"]));
    assert_eq!(admin.call(Method::DELETE, "/v1/admin/templates/kept", None).await.0, 204);
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

/// What comes before and after a recipe, where nothing outside can be reached: lists of packages that cannot be fetched are no failure.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipe_is_prepared_and_cleaned_up_after() {
    let platform = platform(Options::default());
    let admin = Admin::of(&platform);
    let id = admin.build(json!({"name": "whole", "recipe": ["RUN id -un; pwd"], "memory_mb": 512})).await;
    let build = admin.succeeded(&id).await;
    let steps: Vec<(&str, &str)> = build["logs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|log| (log["phase"].as_str().unwrap(), log["cmd"].as_str().unwrap()))
        .collect();
    assert_eq!(
        steps,
        [
            ("pre-build", "RUN apt-get update"),
            ("pre-build", "USER wrenn-user"),
            ("pre-build", "WORKDIR /home/wrenn-user"),
            ("recipe", "RUN id -un; pwd"),
            ("post-build", "RUN apt-get clean"),
            ("post-build", "RUN apt-get autoremove -y"),
            ("post-build", "RUN rm -rf /var/lib/apt/lists/*"),
        ]
    );
    assert_eq!(build["logs"][3]["stdout"], "wrenn-user\n/home/wrenn-user\n");
    assert_eq!(build["default_user"], "wrenn-user");
    assert_eq!(platform.finish(), Default::default());
}

/// Another replica, or the same one when it is back, begins a build anew, and finishes one whose template was wished.
#[tokio::test(flavor = "multi_thread")]
async fn the_control_plane_dies_at_every_step_of_a_build() {
    let deaths = CrashPoints::new();
    let platform = platform(Options { env: deaths.env(), ..Options::default() });
    let before = platform.objects();
    let admin = Admin::of(&platform);
    for point in ["cp.build.taken", "cp.build.step", "cp.build.made", "cp.build.wished", "cp.snapshot.ended"] {
        deaths.arm(point);
        let recipe = json!(["RUN date +%s%N >/root/once", "RUN test $(wc -l </root/once) -eq 1"]);
        let config = json!({"name": "often", "recipe": recipe, "skip_pre_post": true, "memory_mb": 256});
        let answer = admin.request(Method::POST, "/v1/admin/builds").header("Idempotency-Key", point).json(&config);
        // It may die before it answers.
        drop(answer.send().await);
        let again = wait::until("the control plane is back", SOON, || async {
            let request = admin.request(Method::POST, "/v1/admin/builds").header("Idempotency-Key", point);
            let answer = request.json(&config).send().await.ok()?;
            (answer.status() == StatusCode::CREATED).then_some(())?;
            answer.json::<Value>().await.ok()
        })
        .await;
        let build = admin.succeeded(again["id"].as_str().unwrap()).await;
        assert_eq!(build["logs"].as_array().map(Vec::len), Some(2), "{point}: {build:#}");
        deaths.expect_death(point);
        eprintln!("survived a kill -9 at {point}");
    }
    platform.wait_ready().await;
    admin.until_none().await;
    let (_, templates) = admin.call(Method::GET, "/v1/admin/templates", None).await;
    let built = templates.as_array().unwrap().iter().filter(|template| template["type"] == "snapshot");
    assert_eq!(built.count(), 1, "{templates}");
    assert_eq!(admin.call(Method::DELETE, "/v1/admin/templates/often", None).await.0, 204);
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}

/// What a WebSocket says, up to the end of what runs.
async fn heard(admin: &Admin<'_>, path: &str, first: Option<Value>, typed: &str) -> String {
    let mut request = format!("{}{path}", admin.platform.api.replace("http", "ws")).into_client_request().unwrap();
    request.headers_mut().insert("Authorization", format!("Bearer {}", admin.token).parse().unwrap());
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap_or_else(|e| panic!("{path}: {e}"));
    if let Some(first) = first {
        socket.send(Message::Text(first.to_string().into())).await.unwrap();
    }
    if !typed.is_empty() {
        socket.send(Message::Binary(typed.as_bytes().to_vec().into())).await.unwrap();
    }
    let mut said = String::new();
    loop {
        match tokio::time::timeout(SOON, socket.next()).await.expect("a frame in time") {
            Some(Ok(Message::Text(text))) => {
                let frame: Value = serde_json::from_str(&text).unwrap();
                said.push_str(frame["data"].as_str().unwrap_or_default());
                if matches!(frame["type"].as_str(), Some("exit" | "error")) {
                    return format!("{said}{frame}");
                }
            }
            Some(Ok(Message::Binary(bytes))) => said.push_str(&String::from_utf8_lossy(&bytes)),
            Some(Ok(Message::Close(_)) | Err(_)) | None => return said,
            Some(Ok(_)) => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn administrators_work_in_sandboxes_of_the_platform_and_publish_them() {
    let platform = platform(Options::default());
    let before = platform.objects();
    let admin = Admin::of(&platform);
    let body = json!({"template": "minimal", "memory_mb": 256});
    let (status, made) = admin.call(Method::POST, "/v1/admin/capsules?wait_sec=110", Some(body)).await;
    assert_eq!(status, 201, "{made}");
    let id = made["id"].as_str().unwrap();
    let of = |rest: &str| format!("/v1/admin/capsules/{id}{rest}");
    let (status, seen) = admin.call(Method::GET, &of(""), None).await;
    assert_eq!((status, &seen["status"]), (200, &json!("running")), "{seen}");
    assert_eq!(admin.sandboxes().await, 1);
    // Of another team's nobody sees it, and an administrator's token opens no other team's.
    let user = User { platform: &platform, key: admin.key_of_a_team().await };
    assert_eq!(user.call(Method::GET, &format!("/v1/capsules/{id}"), json!({})).await.0, 404);
    let foreign = user.create("minimal").await;
    assert_eq!(admin.call(Method::GET, &format!("/v1/admin/capsules/{foreign}"), None).await.0, 404);
    user.kill(&foreign).await;
    assert_eq!(user.call(Method::GET, "/v1/admin/capsules", json!({})).await.0, 403);

    let (status, ran) = admin.call(Method::POST, &of("/exec"), Some(json!({"cmd": "echo $((6 * 7))"}))).await;
    assert_eq!((status, &ran["stdout"]), (200, &json!("42\n")), "{ran}");
    assert_eq!(admin.call(Method::POST, &of("/files/mkdir"), Some(json!({"path": "/root/made"}))).await.0, 200);
    let form = reqwest::multipart::Form::new().text("path", "/root/made/file").text("file", "content\n");
    let (status, answer) = answered(admin.request(Method::POST, &of("/files/write")).multipart(form)).await;
    assert_eq!(status, 204, "{answer}");
    let (status, text) = admin.call(Method::POST, &of("/files/read"), Some(json!({"path": "/root/made/file"}))).await;
    assert_eq!((status, text), (200, json!("content\n")));
    let (status, list) = admin.call(Method::POST, &of("/files/list"), Some(json!({"path": "/root/made"}))).await;
    assert_eq!((status, &list["entries"][0]["name"]), (200, &json!("file")), "{list}");
    let extra = Some(json!({"path": "/root/made/file", "user": "root"}));
    assert_eq!(admin.call(Method::POST, &of("/files/remove"), extra).await.0, 204);
    let (status, metrics) = admin.call(Method::GET, &of("/metrics?range=10m"), None).await;
    assert_eq!(status, 200, "{metrics}");

    let started = json!({"cmd": "sh", "args": ["-c", "echo begun; trap 'echo ending; exit 0' TERM; while :; do sleep 0.1; done"],
        "background": true, "tag": "loop"});
    assert_eq!(admin.call(Method::POST, &of("/exec"), Some(started)).await.0, 202);
    let (_, processes) = admin.call(Method::GET, &of("/processes"), None).await;
    assert!(processes.to_string().contains("loop"), "{processes}");
    let stream = of("/processes/loop/stream");
    let listening = heard(&admin, &stream, None, "");
    let ending = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(admin.call(Method::DELETE, &of("/processes/loop?signal=SIGTERM"), None).await.0, 204);
    };
    let (said, ()) = tokio::join!(listening, ending);
    assert!(said.contains("begun") && said.contains("ending"), "{said}");
    let start = json!({"type": "start", "cmd": "sh", "args": ["-c", "echo streamed; exit 4"]});
    let said = heard(&admin, &of("/exec/stream"), Some(start), "").await;
    assert!(said.starts_with("streamed\n") && said.contains("\"exit_code\":4"), "{said}");
    let start = json!({"type": "start", "cmd": "/bin/sh", "cols": 80, "rows": 24});
    let said = heard(&admin, &of("/pty"), Some(start), "echo typed-$((1 + 1)); exit\n").await;
    assert!(said.contains("typed-2"), "{said}");

    // It becomes a template, and is gone.
    let (_, wrong) = admin.call(Method::POST, &of("/snapshot"), Some(json!({"name": "a b"}))).await;
    assert_eq!(wrong["error"]["code"], "invalid_request", "{wrong}");
    let (_, wrong) = admin.call(Method::POST, &of("/snapshot"), Some(json!({"name": "minimal"}))).await;
    assert_eq!(wrong["error"]["code"], "name_reserved", "{wrong}");
    let (status, made) = admin.call(Method::POST, &of("/snapshot?wait_sec=110"), Some(json!({"name": "ours"}))).await;
    assert_eq!((status, &made["name"], &made["platform"]), (201, &json!("ours"), &json!(true)), "{made}");
    admin.until_none().await;
    let sandbox = user.create("ours").await;
    assert_eq!(user.shell(&sandbox, "ls -d /root/made").await, "/root/made\n");
    user.kill(&sandbox).await;
    // One that is not wanted.
    let body = json!({"template": "ours"});
    let (status, other) = admin.call(Method::POST, "/v1/admin/capsules?wait_sec=110", Some(body)).await;
    assert_eq!(status, 201, "{other}");
    let path = format!("/v1/admin/capsules/{}", other["id"].as_str().unwrap());
    assert_eq!(admin.call(Method::DELETE, &path, None).await.0, 204);
    assert_eq!(admin.call(Method::DELETE, "/v1/admin/templates/ours", None).await.0, 204);
    platform.expect_objects(&before).await;
    assert_eq!(platform.finish(), Default::default());
}
