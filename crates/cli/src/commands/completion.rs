//! `wrenn completion SHELL`: a script by which a shell completes commands and options.

use std::process::ExitCode;

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::Arguments as All;
use crate::failure::Failure;
use crate::output::print_line;

#[derive(clap::Args)]
#[command(after_help = "\
bash:  wrenn completion bash > /etc/bash_completion.d/wrenn
zsh:   wrenn completion zsh > \"${fpath[1]}/_wrenn\"
fish:  wrenn completion fish > ~/.config/fish/completions/wrenn.fish")]
pub struct Arguments {
    shell: Shell,
}

pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut All::command(), "wrenn", &mut script);
    print_line(String::from_utf8_lossy(&script).trim_end())?;
    Ok(ExitCode::SUCCESS)
}
