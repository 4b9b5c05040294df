//! `.ci/kvm-host` names all that `make check-kvm` does not find, at once and each with its cure.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Look {
    passes: bool,
    said: String,
}

fn look(device: &Path, firecracker: &Path, jailer: &Path) -> Look {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(".ci/kvm-host");
    let output = Command::new(script)
        .arg(device)
        .env("WRENN_FIRECRACKER_BIN", firecracker)
        .env("WRENN_JAILER_BIN", jailer)
        .output()
        .unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    Look { passes: output.status.success(), said: String::from_utf8(output.stdout).unwrap() }
}

/// What answers as a release does when it is asked for its version.
fn program(path: PathBuf, says: &str) -> PathBuf {
    fs::write(&path, format!("#!/bin/sh\necho '{says}'\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn each_missing_thing_is_named_with_its_cure() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let nothing = look(&at("no-kvm"), &at("no-firecracker"), &at("no-jailer"));
    assert!(!nothing.passes);
    for named in [
        format!("missing: {}", at("no-kvm").display()),
        "modprobe".to_owned(),
        format!("missing: a program at {}", at("no-firecracker").display()),
        "WRENN_FIRECRACKER_BIN".to_owned(),
        format!("missing: a program at {}", at("no-jailer").display()),
        "WRENN_JAILER_BIN".to_owned(),
    ] {
        assert!(nothing.said.contains(&named), "{named:?} is not in\n{}", nothing.said);
    }
    assert!(!look(&at("no-kvm"), Path::new(""), Path::new("")).passes);

    // A file is no device.
    fs::write(at("file"), "").unwrap();
    assert!(look(&at("file"), &at("a"), &at("b")).said.contains("missing: access to"));

    // What is there is not named.
    let firecracker = program(at("firecracker-v1.17.0"), "Firecracker v1.17.0");
    let jailer = program(at("jailer-v1.17.0"), "Jailer v1.17.0");
    let found = look(Path::new("/dev/null"), &firecracker, &jailer);
    assert!(!found.said.contains("a program") && !found.said.contains("missing: access"), "{}", found.said);

    // Another machine's program, or none at all.
    let foreign = program(at("firecracker-foreign"), "cannot execute binary file");
    let refused = look(Path::new("/dev/null"), &foreign, &jailer);
    assert!(refused.said.contains("missing: a program that runs at"), "{}", refused.said);
}

#[test]
fn programs_that_do_not_belong_together_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let said = |firecracker: &Path, jailer: &Path| look(Path::new("/dev/null"), firecracker, jailer).said;
    let firecracker = program(at("firecracker"), "Firecracker v1.17.0");
    let jailer = program(at("jailer"), "Jailer v1.17.0");
    let fine = said(&firecracker, &jailer);
    assert!(!fine.contains("same release") && !fine.contains("named firecracker"), "{fine}");
    let other = program(at("jailer-other"), "Jailer v1.16.2");
    assert!(said(&firecracker, &other).contains("Firecracker is 1.17.0 and its jailer 1.16.2"));
    let misnamed = program(at("vmm"), "Firecracker v1.17.0");
    assert!(said(&misnamed, &jailer).contains("missing: a program named firecracker"));
}
