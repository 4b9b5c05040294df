//! A child that ends with this process. The kernel's death signal is sent when the *thread* that made the child ends, and the threads of
//! tests end with each test, so children are made by one thread that lives as long as the process.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::{OnceLock, mpsc};

type Job = (Command, mpsc::SyncSender<std::io::Result<Child>>);

/// Starts `command`; it gets SIGQUIT (PostgreSQL's immediate shutdown, which ends all its processes) when this process ends.
pub fn spawn(command: Command) -> std::io::Result<Child> {
    static KEEPER: OnceLock<mpsc::SyncSender<Job>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        // One job at a time: a spawn takes milliseconds.
        let (jobs, queue) = mpsc::sync_channel::<Job>(1);
        std::thread::Builder::new()
            .name("postgres-keeper".to_owned())
            .spawn(move || {
                for (mut command, answer) in queue {
                    bind_to_this_process(&mut command);
                    // Whoever asked may be gone; then the child is, at the end of the process.
                    let _ = answer.send(command.spawn());
                }
            })
            .expect("a thread can be started");
        jobs
    });
    let (answer, outcome) = mpsc::sync_channel(1);
    keeper.send((command, answer)).expect("the keeper lives as long as its sender, which is static");
    outcome.recv().expect("the keeper answers every job")
}

/// After the change of user, which would clear the death signal: that is done before what is registered here runs.
fn bind_to_this_process(command: &mut Command) {
    let parent = std::process::id();
    let bind = move || {
        // SAFETY: prctl with these arguments reads and writes no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGQUIT) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        // The parent may have ended before the signal was asked for.
        if std::os::unix::process::parent_id() != parent {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    };
    // SAFETY: `bind` calls prctl and getppid, which are async-signal-safe, and allocates nothing.
    unsafe { command.pre_exec(bind) };
}
