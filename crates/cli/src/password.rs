//! A password from whoever types it, not shown meanwhile; or from a pipe, a line for each.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

use crate::failure::{Doing as _, Failure};

/// One line. `prompt` is shown where there is a terminal.
pub fn asked_for(prompt: &str) -> Result<String, Failure> {
    let stdin = std::io::stdin();
    let mut line = String::new();
    let before = if stdin.is_terminal() {
        eprint!("{prompt}: ");
        let _ = std::io::stderr().flush();
        let before = tcgetattr(&stdin).doing(|| "ask the terminal how it is set".to_owned())?;
        let mut silent = before.clone();
        silent.local_flags.remove(LocalFlags::ECHO);
        tcsetattr(&stdin, SetArg::TCSAFLUSH, &silent).doing(|| "silence the terminal".to_owned())?;
        Some(before)
    } else {
        None
    };
    let read = stdin.lock().read_line(&mut line);
    if let Some(before) = before {
        tcsetattr(&stdin, SetArg::TCSAFLUSH, &before).doing(|| "set the terminal as it was".to_owned())?;
        eprintln!();
    }
    read.doing(|| "read the password".to_owned())?;
    let password = line.trim_end_matches(['\r', '\n']).to_owned();
    if password.is_empty() {
        Err(Failure::usage("no password: give it by the environment, or type it"))
    } else {
        Ok(password)
    }
}

/// As given, or else asked for.
pub fn given_or_asked_for(given: Option<String>, prompt: &str) -> Result<String, Failure> {
    match given.filter(|password| !password.is_empty()) {
        Some(password) => Ok(password),
        None => asked_for(prompt),
    }
}
