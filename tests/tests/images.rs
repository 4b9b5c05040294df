//! Images: those that are derived from the minimal one, and those of operators: a container becomes a template by the script of the manual,
//! with podman and without a registry.

use std::path::{Path, PathBuf};
use std::process::Command;

use reqwest::Method;
use serde_json::json;
use whole_machine::platform::{CREATE_LIMIT, Platform};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

/// The tree that the minimal image was made from, as `make images` keeps it.
fn base_tar() -> PathBuf {
    let artifacts =
        std::env::var_os("WRENN_TEST_ARTIFACTS").expect("WRENN_TEST_ARTIFACTS names what `make images` made");
    let bases = Path::new(&artifacts).parent().expect("it lies in the cache").join("base");
    let entries = std::fs::read_dir(&bases).unwrap_or_else(|e| panic!("{}: {e}", bases.display()));
    let tars = entries.flatten().map(|entry| entry.path().join("base.tar")).filter(|tar| tar.is_file());
    tars.max_by_key(|tar| tar.metadata().and_then(|file| file.modified()).ok()).expect("a base.tar")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_becomes_a_template() {
    let platform = Platform::start();
    let scratch = tempfile::tempdir_in("/var/tmp").unwrap();
    // podman with directories of its own, so that no other container of the machine is touched.
    let podman = scratch.path().join("podman");
    let place = scratch.path().display();
    std::fs::write(
        &podman,
        format!("#!/bin/sh\nexec podman --root '{place}/root' --runroot '{place}/run' --storage-driver vfs \"$@\"\n"),
    )
    .unwrap();
    run(Command::new("chmod").arg("+x").arg(&podman));
    run(Command::new(&podman).arg("import").arg(base_tar()).arg("wrenn-test"));
    run(Command::new(&podman).args(["create", "--name", "made", "--network", "none", "wrenn-test", "/bin/sh"]));

    let script = root().join("scripts/rootfs-from-container.sh");
    let convert = |args: &[&str]| {
        let mut command = Command::new(&script);
        command.args(args).env("CONTAINER_TOOL", &podman).env("WRENN_DIR", &platform.dir);
        command
    };
    for (args, says) in [
        (vec!["made", "../x"], "is no name of a template"),
        (vec!["made", "minimal"], "choose another name"),
        (vec!["made", "python"], "choose another name"),
        (vec!["made"], "usage"),
        (vec!["--size-mib", "x", "made", "mine"], "takes a number"),
        (vec!["no-such-container", "mine"], ""),
    ] {
        let output = convert(&args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(says), "{args:?}: {said}");
    }
    run(&mut convert(&["--size-mib", "2048", "made", "mine"]));
    let image = platform.dir.join("images/mine");
    assert!(image.join("rootfs.ext4").is_file() && image.join("digest").is_file());
    let left: Vec<_> = std::fs::read_dir(&platform.dir)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".container-"))
        .collect();
    assert!(left.is_empty(), "{left:?}");

    // The host tells of it by its next heartbeat, at the latest.
    let began = std::time::Instant::now();
    let id = loop {
        let body = json!({"template": "mine", "memory_mb": 256});
        let (status, answer) = platform.call(Method::POST, "/v1/sandboxes?wait_sec=60", Some(body)).await;
        if status == 201 {
            break answer["id"].as_str().unwrap().to_owned();
        }
        assert!(status == 404 && began.elapsed() < CREATE_LIMIT, "{status}: {answer}");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    };
    // What a container's image does not say is what the default of every sandbox is.
    let (code, said) = platform.shell(&id, "whoami; id -u user; id -u wrenn-user; sudo -n id -u; ps -o comm= 1").await;
    assert_eq!((code, said.as_str()), (0, "wrenn-user\n1000\n1001\n0\ntini\n"));
    platform.kill(&id).await;

    // Published anew while a sandbox of the old one runs: that one keeps its disk.
    let old = platform.create_with(json!({"template": "mine", "memory_mb": 256})).await;
    let before = std::fs::read_to_string(image.join("digest")).unwrap();
    run(Command::new(&podman).args(["rm", "made"]));
    std::fs::write(scratch.path().join("hello"), "from the container\n").unwrap();
    run(Command::new(&podman).args(["create", "--name", "made", "--network", "none", "wrenn-test", "/bin/sh"]));
    run(Command::new(&podman).arg("cp").arg(scratch.path().join("hello")).arg("made:/hello"));
    run(&mut convert(&["--size-mib", "2048", "made", "mine"]));
    assert_ne!(std::fs::read_to_string(image.join("digest")).unwrap(), before);
    assert_ne!(platform.shell(&old, "cat /hello").await.0, 0);
    let new = platform.create_with(json!({"template": "mine", "memory_mb": 256})).await;
    assert_eq!(platform.shell(&new, "cat /hello").await, (0, "from the container\n".to_owned()));
    run(Command::new(&podman).args(["rm", "made"]));
    assert_eq!(platform.finish(), Default::default());
}

/// What is asked of each derived image, one command at a time: under emulation npm takes 15 s alone, and a virtual environment with pip 35 s.
const DERIVED: [(&str, &[(&str, &str)]); 2] = [
    (
        "python",
        &[
            ("python3 -c 'print(6*7)'", "42\n"),
            ("python --version", "Python 3."),
            ("pip --version", "pip "),
            ("pip install --no-index pip", "already satisfied"),
            ("python3 -m venv /tmp/v && test -x /tmp/v/bin/pip", ""),
            ("/tmp/v/bin/python -c 'import pip; print(pip.__path__)'", "/tmp/v/lib"),
        ],
    ),
    (
        "node",
        &[
            ("node -e 'console.log(6*7)'", "42\n"),
            ("npm --version", "."),
            ("mkdir /tmp/n && cd /tmp/n && npm init -y && cat package.json", "\"version\""),
        ],
    ),
];
/// Longest of these commands, on a busy machine; below the client's own limit.
const COMMAND_LIMIT_SEC: u32 = 150;

#[tokio::test(flavor = "multi_thread")]
async fn derived_images_have_what_they_are_for() {
    let artifacts = PathBuf::from(std::env::var_os("WRENN_TEST_ARTIFACTS").expect("what `make images` made"));
    for (template, _) in DERIVED {
        let image = artifacts.join("images").join(template).join("rootfs.ext4");
        assert!(image.is_file(), "there is no image {template}: `make images` makes it");
    }
    let platform = Platform::start();
    for (template, commands) in DERIVED {
        let id = platform.create_with(json!({"template": template, "memory_mb": 512})).await;
        for (command, says) in commands {
            let body = json!({"cmd": "/bin/sh", "args": ["-c", command], "timeout_sec": COMMAND_LIMIT_SEC});
            let (status, outcome) = platform.call(Method::POST, &format!("/v1/sandboxes/{id}/exec"), Some(body)).await;
            let succeeded = status == 200 && outcome["exit_code"] == 0;
            let said = outcome["stdout"].as_str().unwrap_or_default();
            assert!(succeeded && said.contains(says), "{template}: {command}: {status} {outcome}");
        }
        platform.kill(&id).await;
    }
    assert_eq!(platform.finish(), Default::default());
}
