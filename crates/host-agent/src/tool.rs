//! Running the few programs that the agent leaves work to (`ip`, `nft`, `mkfs.xfs`, `e2fsck`, `resize2fs`): input by pipe, a deadline, and
//! their own words in the error.

use std::io::{self, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// `ip` and `nft` take tens of milliseconds; this is for a machine far overloaded.
const LIMIT: Duration = Duration::from_secs(20);
const SAID_MAX: usize = 512;

#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    #[error("{program} cannot be run")]
    Run {
        program: &'static str,
        #[source]
        cause: io::Error,
    },
    #[error("{program} took longer than {limit:?}")]
    Slow { program: &'static str, limit: Duration },
    #[error("{program}: {said}")]
    Failed { program: &'static str, said: String },
}

/// Standard output of a program that must succeed. Blocks; runs in the calling thread's namespace.
pub fn run(program: &'static str, arguments: &[&str], input: &str) -> Result<String, ToolError> {
    run_within(program, arguments, input, LIMIT, &[0])
}

/// The same with a deadline of one's own and the exit codes that are no failure.
pub fn run_within(
    program: &'static str,
    arguments: &[&str],
    input: &str,
    limit: Duration,
    fine: &[i32],
) -> Result<String, ToolError> {
    let failed = |cause| ToolError::Run { program, cause };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut stdin = child.stdin.take().expect("stdin is a pipe");
    let input = input.to_owned();
    // On a thread of its own: a program that says much before it has read all would wait for us, and we for it.
    let feeder = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    // Not by its number, which another process may have as soon as the child is collected.
    let held = Pid::from_raw(i32::try_from(child.id()).expect("a pid fits")).expect("a child's pid is not 0");
    let held = match pidfd_open(held, PidfdFlags::empty()) {
        Ok(held) => held,
        Err(errno) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(errno.into()));
        }
    };
    let (done, ended) = std::sync::mpsc::channel();
    let watch = std::thread::spawn(move || {
        if ended.recv_timeout(limit).is_err() {
            let _ = pidfd_send_signal(&held, Signal::KILL);
            return true;
        }
        false
    });
    let began = Instant::now();
    let output = child.wait_with_output().map_err(failed);
    let _ = done.send(());
    let killed = watch.join().unwrap_or(false) || began.elapsed() > limit;
    let _ = feeder.join();
    let output = output?;
    if output.status.code().is_some_and(|code| fine.contains(&code)) {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    if killed {
        return Err(ToolError::Slow { program, limit });
    }
    let said: String = String::from_utf8_lossy(&output.stderr).chars().take(SAID_MAX).collect();
    Err(ToolError::Failed { program, said: said.trim().replace('\n', "; ") })
}

/// One `ip -batch`, in a named namespace or the own one.
pub fn ip_batch(namespace: Option<&str>, lines: &str) -> Result<(), ToolError> {
    let mut arguments = Vec::new();
    if let Some(namespace) = namespace {
        arguments.extend(["-n", namespace]);
    }
    arguments.extend(["-batch", "-"]);
    run("ip", &arguments, lines).map(|_| ())
}
