//! The agent's port with real certificates and a real envd: who gets in, and what is relayed.

mod platform;
mod port;
mod stage;

use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use api::host::__buffa::oneof::exec_response::Event;
use api::host::__buffa::oneof::read_file_response::Part as ReadPart;
use api::host::__buffa::oneof::write_file_request::Part as WritePart;
use api::host::{
    self, CloseStdinRequest, ConnectProcessRequest, EnsureKilledRequest, EnsureRunningRequest, ExecRequest, Fence,
    GetHostRequest, GetSandboxRequest, ListProcessesRequest, ListSandboxesRequest, ProcessSelector, ReadFileRequest,
    ResizeTerminalRequest, SandboxSpec, SendInputRequest, SignalProcessRequest, TerminalSize, WriteFileHead,
    WriteFileRequest,
};
use api::v1::hosts::IdleTimeout;
use connectrpc::{ConnectError, ErrorCode};
use host_agent::credentials::KeyPem;
use host_agent::rpc::serve;
use platform::{Authority, Client, named};
use port::Port;
use stage::id;
use tokio::time::Instant;

fn fence(revision: u64) -> Fence {
    Fence { host_epoch: 1, revision, operation_id: format!("op-{revision}"), ..Default::default() }
}

fn running(n: u128, revision: u64) -> EnsureRunningRequest {
    EnsureRunningRequest {
        sandbox_id: id(n).to_string(),
        fence: fence(revision).into(),
        spec: SandboxSpec {
            template: "minimal".to_owned(),
            vcpus: 1,
            memory_mib: 256,
            disk_mib: 1024,
            envs: [("GREETING".to_owned(), "hello".to_owned())].into_iter().collect(),
            default_user: "root".to_owned(),
            ..Default::default()
        }
        .into(),
        ..Default::default()
    }
}

fn killed(n: u128, revision: u64) -> EnsureKilledRequest {
    EnsureKilledRequest { sandbox_id: id(n).to_string(), fence: fence(revision).into(), ..Default::default() }
}

fn reason(error: &ConnectError) -> (ErrorCode, Option<&'static str>) {
    (error.code, host::reason(error.message.as_deref().unwrap_or_default()).0)
}

/// What a command printed, and its exit code.
async fn run(client: &Client, cmd: &str, timeout_ms: u32) -> Result<(Vec<u8>, Vec<u8>, i32), ConnectError> {
    let request = ExecRequest {
        sandbox_id: id(1).to_string(),
        cmd: "/bin/sh".to_owned(),
        args: vec!["-c".to_owned(), cmd.to_owned()],
        timeout_ms,
        ..Default::default()
    };
    let mut stream = client.exec(request).await?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let mut started = false;
    while let Some(message) = stream.message().await? {
        match message.to_owned_message().event {
            Some(Event::Start(start)) => started = start.pid > 0,
            Some(Event::Stdout(bytes)) => out.extend(bytes),
            Some(Event::Stderr(bytes)) => err.extend(bytes),
            Some(Event::End(end)) => {
                assert!(started, "no start before the end");
                return Ok((out, err, end.exit_code));
            }
            Some(Event::Pty(_)) => panic!("it has no terminal"),
            Some(Event::Keepalive(_)) | None => {}
        }
    }
    panic!("no end: {:?} {:?}", String::from_utf8_lossy(&out), String::from_utf8_lossy(&err))
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_control_plane_gets_in() {
    let port = Port::open().await;
    let (own, other) = (&port.authority, Authority::new());
    port.client().list_sandboxes(ListSandboxesRequest::default()).await.unwrap();
    let (now, day) = (SystemTime::now(), Duration::from_secs(86_400));
    let mut expired = named(host::CONTROL_PLANE_NAME);
    (expired.not_before, expired.not_after) = ((now - 2 * day).into(), (now - day).into());
    let mut early = named(host::CONTROL_PLANE_NAME);
    early.not_before = (now + day).into();
    let mut server = named(host::CONTROL_PLANE_NAME);
    server.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let mut two_names = named("wrenn-agent");
    two_names.subject_alt_names.push(rcgen::SanType::DnsName(host::CONTROL_PLANE_NAME.try_into().unwrap()));
    let control_plane = |authority: &Authority| Some(authority.certificate(host::CONTROL_PLANE_NAME));
    for (who, client) in [
        ("nobody", own.client(None, &port.url)),
        ("another host", own.client(Some(own.certificate("wrenn-agent")), &port.url)),
        ("another host, with the name beside its own", own.client(Some(own.sign(two_names)), &port.url)),
        ("another authority", own.client(control_plane(&other), &port.url)),
        ("a certificate that has expired", own.client(Some(own.sign(expired)), &port.url)),
        ("a certificate that is not valid yet", own.client(Some(own.sign(early)), &port.url)),
        ("a certificate for servers", own.client(Some(own.sign(server)), &port.url)),
        ("TLS 1.2", own.client_by(&[&rustls::version::TLS12], control_plane(own), &port.url)),
        ("no TLS", own.client(control_plane(own), &port.url.replace("https", "http"))),
    ] {
        let answer = client.list_sandboxes(ListSandboxesRequest::default()).await;
        assert!(answer.is_err(), "{who} got in");
    }
    port.client().list_sandboxes(ListSandboxesRequest::default()).await.unwrap();
    port.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_certificate_changes_without_a_gap() {
    let port = Port::open().await;
    let client = port.client();
    let id = id(1).to_string();
    client.ensure_running(running(1, 1)).await.unwrap();
    let request = ExecRequest {
        sandbox_id: id,
        cmd: "sh".to_owned(),
        args: vec!["-c".to_owned(), "sleep 1; echo after".to_owned()],
        timeout_ms: 30_000,
        ..Default::default()
    };
    let mut stream = client.exec(request).await.unwrap();
    let mut renewed = port.agent.credentials.borrow().clone();
    let (certificate, key) = port.authority.certificate("wrenn-agent");
    (renewed.cert_pem, renewed.key_pem) = (certificate.pem(), KeyPem(key.serialize_pem()));
    port.tls.send_replace(serve::server_config(&renewed).unwrap());
    // Who comes now is shown the new one.
    port.client().list_sandboxes(ListSandboxesRequest::default()).await.unwrap();
    let mut out = Vec::new();
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::Stdout(bytes)) = message.to_owned_message().event {
            out.extend(bytes);
        }
    }
    assert_eq!(out, b"after\n");
    port.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_that_say_nothing_take_no_place_of_the_control_plane() {
    let port = Port::open().await;
    let address = port.url.trim_start_matches("https://").to_owned();
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(tokio::net::TcpStream::connect(&address).await.unwrap());
    }
    let client = port.client();
    let answer =
        tokio::time::timeout(Duration::from_secs(5), client.list_sandboxes(ListSandboxesRequest::default())).await;
    answer.expect("strangers are in the way").unwrap();
    port.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_made_while_the_hosts_disk_hangs() {
    let port = Port::open().await;
    assert_eq!(port.agent.report().await.facts.cpu_cores, 2);
    port.disk_hangs.store(true, Ordering::Relaxed);
    let report =
        async |at_most| tokio::time::timeout(at_most, port.agent.report()).await.expect("it waits for the disk");
    assert_eq!(report(Duration::from_secs(15)).await.facts.cpu_cores, 2);
    // Nobody waits behind a look that hangs.
    assert_eq!(report(Duration::from_secs(2)).await.facts.cpu_cores, 2);
    port.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_by_rpc_from_create_to_kill() {
    let port = Port::open().await;
    let client = port.client();

    let state = client.ensure_running(running(1, 1)).await.unwrap().into_owned().state;
    assert_eq!((state.observed.as_str(), state.revision), ("running", 1), "{}", state.reason);
    assert_eq!(state.isolation, "fake");
    assert_eq!(state.steps.len(), 11);

    let (out, err, code) = run(&client, "echo $GREETING; echo no >&2; exit 7", 0).await.unwrap();
    assert_eq!((out.as_slice(), err.as_slice(), code), (&b"hello\n"[..], &b"no\n"[..], 7));

    // Much output arrives whole and in order.
    let (out, _, code) = run(&client, "seq 1 200000", 0).await.unwrap();
    let expected: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    assert!(out == expected.as_bytes() && code == 0, "{} bytes", out.len());

    let begin = std::time::Instant::now();
    let late = run(&client, "sleep 60", 300).await.unwrap_err();
    assert_eq!(late.code, ErrorCode::DeadlineExceeded, "{late}");
    // The guest ends it, not the host's later timer.
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());

    // A file there and back.
    let path = port.stage.dir.join("a file ä");
    let content: Vec<u8> = (0..3_000_000u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let head = WriteFileHead {
        sandbox_id: id(1).to_string(),
        path: path.to_string_lossy().into_owned(),
        ..Default::default()
    };
    let mut parts = vec![WriteFileRequest { part: Some(WritePart::from(head)), ..Default::default() }];
    for chunk in content.chunks(100_000) {
        parts.push(WriteFileRequest { part: Some(WritePart::Chunk(chunk.to_vec())), ..Default::default() });
    }
    // Without the end mark it is no file.
    client.write_file(futures::stream::iter(parts.clone())).await.expect_err("an upload that broke off");
    assert!(!path.exists());
    let end = api::host::WriteFileEnd::default();
    parts.push(WriteFileRequest { part: Some(WritePart::from(end)), ..Default::default() });
    let written = client.write_file(futures::stream::iter(parts)).await.unwrap().into_owned();
    assert_eq!(written.size, 3_000_000);
    assert_eq!(std::fs::read(&path).unwrap(), content);
    let request = ReadFileRequest {
        sandbox_id: id(1).to_string(),
        path: path.to_string_lossy().into_owned(),
        ..Default::default()
    };
    let mut stream = client.read_file(request).await.unwrap();
    let (mut size, mut back) = (None, Vec::new());
    while let Some(message) = stream.message().await.unwrap() {
        match message.to_owned_message().part {
            Some(ReadPart::Head(head)) => size = head.size,
            Some(ReadPart::Chunk(chunk)) => back.extend(chunk),
            None => {}
        }
    }
    assert_eq!(size, Some(3_000_000));
    assert!(back == content);

    let state = client.ensure_killed(killed(1, 2)).await.unwrap().into_owned().state;
    assert_eq!(state.observed, "killed");
    assert_eq!(port.stage.leftovers(), Vec::<String>::new());
    let gone =
        client.exec(ExecRequest { sandbox_id: id(1).to_string(), cmd: "true".to_owned(), ..Default::default() }).await;
    assert_eq!(reason(&error_of(gone).await), (ErrorCode::NotFound, Some(host::UNKNOWN_SANDBOX)));
    port.stop.cancel();
}

/// What passes through for a user keeps a sandbox busy; the agent's own questions do not.
#[tokio::test(flavor = "multi_thread")]
async fn calls_keep_a_sandbox_busy_for_as_long_as_they_are_under_way() {
    let port = Port::open().await;
    let client = port.client();
    client.ensure_running(running(1, 1)).await.unwrap();
    let guest = port.agent.sandboxes.guest(&id(1)).unwrap();
    let is_in_use = || {
        let later = Instant::now() + Duration::from_secs(3600);
        guest.last_used(later) == later
    };
    let list = async || {
        let request = ListProcessesRequest { sandbox_id: id(1).to_string(), ..Default::default() };
        client.list_processes(request).await.unwrap();
        guest.last_used(Instant::now())
    };
    assert!(!is_in_use());
    let request = ExecRequest {
        sandbox_id: id(1).to_string(),
        cmd: "/bin/sleep".to_owned(),
        args: vec!["1000".to_owned()],
        ..Default::default()
    };
    let mut stream = client.exec(request).await.unwrap();
    stream.message().await.unwrap();
    list().await;
    assert!(is_in_use());
    drop(stream);
    soon("the call to be over", || (!is_in_use()).then_some(())).await;
    let used = guest.last_used(Instant::now());
    guest.activity().await.unwrap();
    assert_eq!(guest.last_used(Instant::now()), used);
    assert!(list().await > used);

    // It is in the report as soon as the control plane has named it and it was asked.
    assert_eq!(port.agent.report().await.sandboxes[0].idle_sec, None);
    tokio::spawn(port.agent.idleness.clone().watch(port.agent.sandboxes.clone(), port.stop.clone()));
    let named = IdleTimeout { id: id(1).to_string(), timeout_sec: 3600, active_sec_ago: 0 };
    port.agent.idleness.tell(vec![named]);
    let idle = soon("it to be asked", || port.agent.idleness.of(&id(1), &guest)).await;
    assert!(idle < 10, "{idle}");
    assert!(port.agent.report().await.sandboxes[0].idle_sec.is_some());
    client.ensure_killed(killed(1, 2)).await.unwrap();
    soon("it to be forgotten", || port.agent.idleness.of(&id(1), &guest).is_none().then_some(())).await;
    port.stop.cancel();
}

async fn soon<T>(what: &str, look: impl Fn() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(15);
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < end, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A stream's error comes with the call or with its first message.
async fn error_of<V>(
    answer: Result<connectrpc::client::ServerStream<hyper::body::Incoming, V>, ConnectError>,
) -> ConnectError
where
    V: buffa::MessageView<'static, Owned = host::ExecResponse> + Send,
    host::ExecResponse: buffa::HasMessageView<View<'static> = V>,
{
    match answer {
        Err(error) => error,
        Ok(mut stream) => stream.message().await.expect_err("a stream of a sandbox that is gone"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_listed_and_signalled() {
    let port = Port::open().await;
    let client = port.client();
    client.ensure_running(running(1, 1)).await.unwrap();
    let request = ExecRequest {
        sandbox_id: id(1).to_string(),
        cmd: "/bin/sleep".to_owned(),
        args: vec!["300".to_owned()],
        tag: "naps".to_owned(),
        ..Default::default()
    };
    let mut stream = client.exec(request).await.unwrap();
    let Some(Event::Start(start)) = stream.message().await.unwrap().unwrap().to_owned_message().event else {
        panic!("the first event is not the start")
    };
    let listed = client
        .list_processes(ListProcessesRequest { sandbox_id: id(1).to_string(), ..Default::default() })
        .await
        .unwrap()
        .into_owned();
    assert!(listed.processes.iter().any(|p| p.pid == start.pid && p.tag == "naps" && p.cmd == "/bin/sleep"));
    let signal = |signal: &str, selector| SignalProcessRequest {
        sandbox_id: id(1).to_string(),
        signal: signal.to_owned(),
        selector: Some(selector),
        ..Default::default()
    };
    use api::host::__buffa::oneof::signal_process_request::Selector;
    let unknown = client.signal_process(signal("SIGKILL", Selector::Pid(1))).await.unwrap_err();
    assert_eq!(unknown.code, ErrorCode::NotFound, "{unknown}");
    let bad = client.signal_process(signal("SIGHUP", Selector::Pid(start.pid))).await.unwrap_err();
    assert_eq!(bad.code, ErrorCode::InvalidArgument);
    client.signal_process(signal("SIGKILL", Selector::Tag("naps".to_owned()))).await.unwrap();
    let mut ended = false;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::End(end)) = message.to_owned_message().event {
            assert!(!end.exited, "{}", end.status);
            ended = true;
        }
    }
    assert!(ended);
    client.ensure_killed(killed(1, 2)).await.unwrap();
    port.stop.cancel();
}

fn shell(script: &str, tag: &str) -> ExecRequest {
    ExecRequest {
        sandbox_id: id(1).to_string(),
        cmd: "/bin/sh".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        tag: tag.to_owned(),
        ..Default::default()
    }
}

fn selector(tag: &str) -> ProcessSelector {
    use api::host::__buffa::oneof::process_selector::Selector;
    ProcessSelector { selector: Some(Selector::Tag(tag.to_owned())), ..Default::default() }
}

/// Where the output of a process begins, what it is (of a terminal, too), and the exit code.
async fn heard(client: &Client, tag: &str, output_from: u64) -> Result<(Option<u64>, Vec<u8>, i32), ConnectError> {
    let request = ConnectProcessRequest {
        sandbox_id: id(1).to_string(),
        process: selector(tag).into(),
        output_from,
        ..Default::default()
    };
    let mut stream = client.connect_process(request).await?;
    let (mut from, mut out) = (None, Vec::new());
    while let Some(message) = stream.message().await? {
        match message.to_owned_message().event {
            Some(Event::Start(start)) => from = start.output_from,
            Some(Event::Stdout(bytes) | Event::Stderr(bytes) | Event::Pty(bytes)) => out.extend(bytes),
            Some(Event::End(end)) => return Ok((from, out, end.exit_code)),
            Some(Event::Keepalive(_)) | None => {}
        }
    }
    panic!("no end of {tag}")
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_are_left_to_run_and_heard_later() {
    use api::host::__buffa::oneof::send_input_request::Input;
    let port = Port::open().await;
    let client = port.client();
    client.ensure_running(running(1, 1)).await.unwrap();
    let guest = port.agent.sandboxes.guest(&id(1)).unwrap();
    let mut request = shell("echo one; read line; echo got $line; cat; exit 4", "job");
    request.stdin = true;
    let started = client.start_process(request.clone()).await.unwrap().into_owned();
    assert!(started.pid > 0 && started.tag == "job");
    let refused = client.start_process(request).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::AlreadyExists);
    // Of many that come at once one gets the tag.
    let at_once = futures::future::join_all((0..8).map(|_| client.start_process(shell("sleep 300", "once")))).await;
    assert_eq!(at_once.iter().filter(|answer| answer.is_ok()).count(), 1);

    let (listener, other) = (client.clone(), client.clone());
    let hearing = tokio::spawn(async move { heard(&listener, "job", 0).await });
    let from_two = tokio::spawn(async move { heard(&other, "job", 2).await });
    let send = |input| SendInputRequest {
        sandbox_id: id(1).to_string(),
        process: selector("job").into(),
        input: Some(input),
        ..Default::default()
    };
    client.send_input(send(Input::Stdin(b"a line\n".to_vec()))).await.unwrap();
    client.send_input(send(Input::Stdin(b"and more\n".to_vec()))).await.unwrap();
    let no_terminal = client.send_input(send(Input::Pty(b"x".to_vec()))).await.unwrap_err();
    assert_eq!(no_terminal.code, ErrorCode::FailedPrecondition);
    let close =
        || CloseStdinRequest { sandbox_id: id(1).to_string(), process: selector("job").into(), ..Default::default() };
    client.close_stdin(close()).await.unwrap();
    let whole = b"one\ngot a line\nand more\n";
    assert_eq!(hearing.await.unwrap().unwrap(), (Some(0), whole.to_vec(), 4));
    let (from, out, _) = from_two.await.unwrap().unwrap();
    assert_eq!(out, whole[usize::try_from(from.unwrap()).unwrap()..]);
    // It has ended, and is still known.
    assert_eq!(heard(&client, "job", 4).await.unwrap(), (Some(4), whole[4..].to_vec(), 4));
    assert_eq!(client.close_stdin(close()).await.unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(heard(&client, "nobody", 0).await.unwrap_err().code, ErrorCode::NotFound);

    // A terminal: its size, what is typed, another size. Being there alone does not keep the sandbox in use.
    let size = |cols, rows| Some(TerminalSize { cols, rows, ..Default::default() }).into();
    let mut request = shell("stty size; read line; stty size; exit 5", "terminal");
    request.terminal = size(100, 30);
    let mut terminal = client.exec(request.clone()).await.unwrap();
    let mut shown = Vec::new();
    while !shown.ends_with(b"30 100\r\n") {
        if let Some(Event::Pty(bytes)) = terminal.message().await.unwrap().unwrap().to_owned_message().event {
            shown.extend(bytes);
        }
    }
    let quiet = soon("the terminal to be quiet", || {
        let used = guest.last_used(Instant::now());
        (used.elapsed() > Duration::from_millis(300)).then_some(used)
    })
    .await;
    let resize = |size| ResizeTerminalRequest {
        sandbox_id: id(1).to_string(),
        process: selector("terminal").into(),
        size,
        ..Default::default()
    };
    for (cols, rows) in [(0, 24), (80, 1001), (u32::MAX, 1)] {
        let wrong = client.resize_terminal(resize(size(cols, rows))).await.unwrap_err();
        assert_eq!(wrong.code, ErrorCode::InvalidArgument, "{cols} {rows}");
    }
    client.resize_terminal(resize(size(120, 40))).await.unwrap();
    let enter = SendInputRequest {
        sandbox_id: id(1).to_string(),
        process: selector("terminal").into(),
        input: Some(Input::Pty(b"\n".to_vec())),
        ..Default::default()
    };
    client.send_input(enter).await.unwrap();
    let (_, out, code) = heard(&client, "terminal", 0).await.unwrap();
    assert!(code == 5 && out.ends_with(b"40 120\r\n"), "{}", String::from_utf8_lossy(&out));
    assert!(guest.last_used(Instant::now()) > quiet, "what comes by it is use");
    drop(terminal);
    client.ensure_killed(killed(1, 2)).await.unwrap();
    port.stop.cancel();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_calls_get_their_codes() {
    let port = Port::open().await;
    let client = port.client();
    client.ensure_running(running(1, 5)).await.unwrap();
    let code = |answer: Result<(), ConnectError>| reason(&answer.expect_err("it was answered"));

    let mut request = running(2, 1);
    request.sandbox_id = "../etc".to_owned();
    assert_eq!(code(client.ensure_running(request).await.map(drop)).0, ErrorCode::InvalidArgument);
    let mut request = running(2, 1);
    request.spec =
        SandboxSpec { template: "nope".to_owned(), vcpus: 1, memory_mib: 256, disk_mib: 1024, ..Default::default() }
            .into();
    assert_eq!(
        code(client.ensure_running(request).await.map(drop)),
        (ErrorCode::NotFound, Some(host::UNKNOWN_TEMPLATE))
    );
    let mut request = running(2, 1);
    request.spec = SandboxSpec {
        template: "minimal".to_owned(),
        vcpus: 1,
        memory_mib: 1 << 20,
        disk_mib: 1024,
        ..Default::default()
    }
    .into();
    assert_eq!(
        code(client.ensure_running(request).await.map(drop)),
        (ErrorCode::ResourceExhausted, Some(host::NO_ROOM))
    );
    let mut request = running(2, 1);
    request.spec =
        SandboxSpec { template: "minimal".to_owned(), vcpus: 0, memory_mib: 256, disk_mib: 1024, ..Default::default() }
            .into();
    assert_eq!(code(client.ensure_running(request).await.map(drop)).0, ErrorCode::InvalidArgument);
    assert_eq!(
        code(client.ensure_running(running(1, 4)).await.map(drop)),
        (ErrorCode::FailedPrecondition, Some(host::STALE_GENERATION))
    );
    let unknown = GetSandboxRequest { sandbox_id: id(77).to_string(), ..Default::default() };
    assert_eq!(code(client.get_sandbox(unknown).await.map(drop)), (ErrorCode::NotFound, Some(host::UNKNOWN_SANDBOX)));
    let missing =
        ReadFileRequest { sandbox_id: id(1).to_string(), path: "/no/such/file".to_owned(), ..Default::default() };
    let answer = match client.read_file(missing).await {
        Err(error) => error,
        Ok(mut stream) => stream.message().await.expect_err("a file that is not there"),
    };
    assert_eq!(answer.code, ErrorCode::NotFound);

    let host = client.get_host(GetHostRequest::default()).await.unwrap().into_owned();
    assert_eq!(host.host_id, "host-1");
    assert_eq!(host.templates, ["minimal"]);
    assert!(host.agent_rss_bytes > 0 && !host.notes.is_empty());
    let list = client.list_sandboxes(ListSandboxesRequest::default()).await.unwrap().into_owned();
    assert!(list.complete);
    assert_eq!(list.sandboxes.len(), 1);
    client.ensure_killed(killed(1, 6)).await.unwrap();
    port.stop.cancel();
}
