//! Named crash points: places in a program where a test may make it fail, stall, stop or die.
//!
//! They are compiled into every build, so that what is tested is what ships, and do nothing unless the environment variable
//! `WRENN_CRASHPOINTS` was set when the process started: one relaxed load of an atomic each. Whoever can set the
//! environment of a root process owns it already, so this opens no door.
//!
//! `WRENN_CRASHPOINTS="create.disk.done=abort;kill.begin=2*error"`: entries `name=[N*]action`, separated by `;`. The action fires at the
//! N-th time the point is reached (1 when N is left out), once; `always*` fires each time. Actions: `abort` (SIGKILL to itself, like
//! `kill -9`), `error` ([`hit`] returns [`Injected`]), `sleep(MS)`, `stop` (SIGSTOP to itself).
//! With `WRENN_CRASHPOINTS_FILE=FILE` the same entries are read from FILE at each point, so that a harness can arm a running program
//! that a supervisor restarts: FILE is removed before its action fires, so the restarted program does not meet it again.
//! With `WRENN_CRASHPOINTS_LIST=FILE` each point that is reached appends its name to FILE, so that a harness can walk them all.
//!
//! Called by the host agent and the control plane at every journaled step. It refuses to know what the steps are.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// The error that a test asked for at a crash point.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("injected at crash point {name}")]
pub struct Injected {
    pub name: &'static str,
}

impl From<Injected> for std::io::Error {
    fn from(injected: Injected) -> Self {
        Self::other(injected)
    }
}

/// Marks a point. Blocks the calling thread when the action is `sleep`; does nothing when no test asked for this point.
pub fn hit(name: &'static str) -> Result<(), Injected> {
    let state = state();
    if !state.armed.load(Ordering::Relaxed) {
        return Ok(());
    }
    state.reach(name)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Abort,
    Error,
    Stop,
    Sleep(Duration),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    action: Action,
    /// Hits still to let pass before firing; `None` fires each time.
    countdown: Option<u32>,
}

#[derive(Default)]
struct State {
    armed: AtomicBool,
    plans: Mutex<HashMap<String, Plan>>,
    list: Option<PathBuf>,
    file: Option<PathBuf>,
}

fn state() -> &'static State {
    static STATE: OnceLock<State> = OnceLock::new();
    STATE.get_or_init(|| {
        let spec = std::env::var("WRENN_CRASHPOINTS").unwrap_or_default();
        let list: Option<PathBuf> = std::env::var_os("WRENN_CRASHPOINTS_LIST").map(Into::into);
        let file: Option<PathBuf> = std::env::var_os("WRENN_CRASHPOINTS_FILE").map(Into::into);
        let plans = parse(&spec).unwrap_or_else(|entry| {
            // A test that misspells its point would otherwise pass without having tested anything.
            eprintln!("WRENN_CRASHPOINTS: cannot read {entry:?}");
            #[expect(clippy::disallowed_methods, reason = "the program must not run on as if its test were armed")]
            std::process::exit(78)
        });
        let armed = !plans.is_empty() || list.is_some() || file.is_some();
        State { armed: armed.into(), plans: Mutex::new(plans), list, file }
    })
}

impl State {
    fn reach(&self, name: &'static str) -> Result<(), Injected> {
        if let Some(path) = &self.list
            && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(path)
        {
            // One write call, so that lines of concurrent tasks do not mix.
            let _ = file.write_all(format!("{name}\n").as_bytes());
        }
        if let Some(action) = self.armed_by_file(name) {
            return act(name, action);
        }
        let action = {
            let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
            match plans.get_mut(name) {
                None => return Ok(()),
                Some(Plan { action, countdown: None }) => *action,
                Some(Plan { countdown: Some(left), .. }) if *left > 1 => {
                    *left -= 1;
                    return Ok(());
                }
                Some(_) => plans.remove(name).map(|plan| plan.action).expect("the entry was just found"),
            }
        };
        act(name, action)
    }

    /// The action that the file asks for at this point, once: the file is gone before the action happens.
    fn armed_by_file(&self, name: &str) -> Option<Action> {
        let path = self.file.as_ref()?;
        let plans = parse(&std::fs::read_to_string(path).ok()?).ok()?;
        let action = plans.get(name)?.action;
        // Of several threads at the same point only the one that removes the file acts.
        std::fs::remove_file(path).ok()?;
        Some(action)
    }
}

fn act(name: &'static str, action: Action) -> Result<(), Injected> {
    match action {
        Action::Error => return Err(Injected { name }),
        Action::Sleep(time) => std::thread::sleep(time),
        Action::Abort => signal_self(libc::SIGKILL),
        Action::Stop => signal_self(libc::SIGSTOP),
    }
    Ok(())
}

fn signal_self(signal: libc::c_int) {
    // SAFETY: kill and getpid have no memory effects; the signal goes to this very process.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// The plans by name, or the entry that cannot be read.
fn parse(spec: &str) -> Result<HashMap<String, Plan>, String> {
    spec.split(';')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
        .map(|entry| parse_entry(entry).ok_or_else(|| entry.to_owned()))
        .collect()
}

fn parse_entry(entry: &str) -> Option<(String, Plan)> {
    let (name, action) = entry.split_once('=')?;
    let (countdown, action) = match action.split_once('*') {
        Some(("always", action)) => (None, action),
        Some((count, action)) => (Some(count.parse().ok().filter(|n| *n > 0)?), action),
        None => (Some(1), action),
    };
    let action = match action {
        "abort" => Action::Abort,
        "error" => Action::Error,
        "stop" => Action::Stop,
        other => {
            let ms = other.strip_prefix("sleep(")?.strip_suffix(')')?.parse().ok()?;
            Action::Sleep(Duration::from_millis(ms))
        }
    };
    Some((name.to_owned(), Plan { action, countdown }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_each_action_and_count() {
        let plans = parse("a=abort; b=2*error;c=always*sleep(15);d=stop;").unwrap();
        assert_eq!(plans["a"], Plan { action: Action::Abort, countdown: Some(1) });
        assert_eq!(plans["b"], Plan { action: Action::Error, countdown: Some(2) });
        assert_eq!(plans["c"], Plan { action: Action::Sleep(Duration::from_millis(15)), countdown: None });
        assert_eq!(plans["d"], Plan { action: Action::Stop, countdown: Some(1) });
    }

    #[test]
    fn refuses_what_it_cannot_read() {
        for bad in ["a", "a=", "a=explode", "a=0*abort", "a=x*abort", "a=sleep(", "a=sleep(x)"] {
            assert!(parse(bad).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn fires_at_the_nth_hit_and_once() {
        let state = State {
            armed: true.into(),
            plans: Mutex::new(parse("p=2*error;q=always*error").unwrap()),
            ..State::default()
        };
        assert_eq!(state.reach("p"), Ok(()));
        assert_eq!(state.reach("p"), Err(Injected { name: "p" }));
        assert_eq!(state.reach("p"), Ok(()));
        assert_eq!(state.reach("q"), state.reach("q"));
        assert!(state.reach("q").is_err());
        assert_eq!(state.reach("other"), Ok(()));
    }

    #[test]
    fn a_file_arms_one_point_once() {
        let path = std::env::temp_dir().join(format!("crashpoint-{}", std::process::id()));
        std::fs::write(&path, "p=error").unwrap();
        let state = State { armed: true.into(), file: Some(path.clone()), ..State::default() };
        assert_eq!(state.reach("other"), Ok(()));
        assert_eq!(state.reach("p"), Err(Injected { name: "p" }));
        assert!(!path.exists());
        assert_eq!(state.reach("p"), Ok(()));
    }
}
