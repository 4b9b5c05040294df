//! A child that ends with this process. The kernel's death signal is sent when the *thread* that made the child ends, and the threads of
//! tests end with each test, so children are made by one thread that lives as long as the process.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};
use std::sync::{OnceLock, mpsc};

use nix::sys::signal::Signal;

type Job = (Command, Signal, mpsc::SyncSender<std::io::Result<Child>>);

/// Starts `command`; it gets `last` when this process ends, however that comes.
pub fn spawn(command: Command, last: Signal) -> std::io::Result<Child> {
    static KEEPER: OnceLock<mpsc::SyncSender<Job>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        // One job at a time: a spawn takes milliseconds.
        let (jobs, queue) = mpsc::sync_channel::<Job>(1);
        std::thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || {
                for (mut command, last, answer) in queue {
                    bind_to_this_process(&mut command, last);
                    // Whoever asked may be gone; then the child is, at the end of the process.
                    let _ = answer.send(command.spawn());
                }
            })
            .expect("a thread can be started");
        jobs
    });
    let (answer, outcome) = mpsc::sync_channel(1);
    keeper.send((command, last, answer)).expect("the keeper lives as long as its sender, which is static");
    outcome.recv().expect("the keeper answers every job")
}

/// After the change of user, which would clear the death signal: that is done before what is registered here runs.
fn bind_to_this_process(command: &mut Command, last: Signal) {
    let (parent, last) = (std::process::id(), last as libc::c_int);
    let bind = move || {
        // SAFETY: prctl with these arguments reads and writes no memory.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, last) } != 0 {
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
