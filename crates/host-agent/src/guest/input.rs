//! Input of processes in the guest, and the size of terminals. Each call is one unary question: whoever wants an order waits for the answer.

use api::guest::process::__buffa::oneof::process_input::Input as Wire;
use api::guest::process::{CloseStdinRequest, PTY, ProcessInput, ProcessSelector, SendInputRequest, UpdateRequest};

use super::processes::{Select, Size};
use super::{Guest, GuestError};

/// Bytes for a process, by which way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    Stdin(Vec<u8>),
    Terminal(Vec<u8>),
}

impl Guest {
    /// Returns when the process's pipe or terminal has taken all of it; envd gives up on a process that does not read for half a minute.
    pub async fn send_input(&self, select: Select, input: Input) -> Result<(), GuestError> {
        let input = match input {
            Input::Stdin(bytes) => Wire::Stdin(bytes),
            Input::Terminal(bytes) => Wire::Pty(bytes),
        };
        let input = ProcessInput { input: Some(input), ..Default::default() }.into();
        let request = SendInputRequest { process: ProcessSelector::from(select).into(), input, ..Default::default() };
        let client = self.process_calls();
        self.alive(async { Ok(client.send_input(request).await?) }).await?;
        Ok(())
    }

    pub async fn close_stdin(&self, select: Select) -> Result<(), GuestError> {
        let request = CloseStdinRequest { process: ProcessSelector::from(select).into(), ..Default::default() };
        let client = self.process_calls();
        self.alive(async { Ok(client.close_stdin(request).await?) }).await?;
        Ok(())
    }

    pub async fn resize(&self, select: Select, size: Size) -> Result<(), GuestError> {
        let pty = Some(PTY::from(size)).into();
        let request = UpdateRequest { process: ProcessSelector::from(select).into(), pty, ..Default::default() };
        let client = self.process_calls();
        self.alive(async { Ok(client.update(request).await?) }).await?;
        Ok(())
    }
}
