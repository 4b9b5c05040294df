//! What hosts say is kept in the database and shown to people, and hosts of teams are strangers: words are cut to what such words need, and
//! hold no control characters, which the database does not take either.

use api::host::{ExecEnd, SandboxState};

/// Of a reason, a sentence for people.
const SENTENCE_CHARS_MAX: usize = 500;
/// Of a name, a version, an incarnation.
const WORD_CHARS_MAX: usize = 128;
/// Steps and versions of one sandbox: an agent knows about twenty.
const ENTRIES_MAX: usize = 64;

/// As a shell's clients know it.
pub fn exit_code(end: &ExecEnd) -> i32 {
    if end.exited { end.exit_code } else { -1 }
}

pub fn sentence(text: &str) -> String {
    cut(text, SENTENCE_CHARS_MAX)
}

pub fn word(text: &str) -> String {
    cut(text, WORD_CHARS_MAX)
}

pub fn state(state: SandboxState) -> SandboxState {
    let mut steps = state.steps;
    steps.truncate(ENTRIES_MAX);
    for step in &mut steps {
        step.name = word(&step.name);
        step.ms = if step.ms.is_finite() { step.ms } else { 0.0 };
    }
    let versions = state.versions.iter().take(ENTRIES_MAX).map(|(name, value)| (word(name), word(value))).collect();
    SandboxState {
        reason: sentence(&state.reason),
        cause: word(&state.cause),
        incarnation: word(&state.incarnation),
        isolation: word(&state.isolation),
        steps,
        versions,
        ..state
    }
}

fn cut(text: &str, chars_max: usize) -> String {
    text.chars().filter(|character| !character.is_control()).take(chars_max).collect()
}

#[cfg(test)]
mod tests {
    use api::host::StepTiming;

    use super::*;

    #[test]
    fn what_a_host_says_is_bounded_and_is_text() {
        let long = "a\0b\n".repeat(100_000);
        let said = state(SandboxState {
            reason: long.clone(),
            incarnation: long.clone(),
            isolation: long.clone(),
            steps: (0..1000).map(|_| StepTiming { name: long.clone(), ms: f64::NAN, ..Default::default() }).collect(),
            versions: (0..1000).map(|n| (format!("{n}{long}"), long.clone())).collect(),
            ..Default::default()
        });
        assert_eq!(said.reason.len(), SENTENCE_CHARS_MAX);
        assert!(said.reason.starts_with("abab"));
        assert_eq!((said.incarnation.len(), said.isolation.len()), (WORD_CHARS_MAX, WORD_CHARS_MAX));
        assert_eq!((said.steps.len(), said.versions.len()), (ENTRIES_MAX, ENTRIES_MAX));
        assert!(said.steps.iter().all(|step| step.name.len() == WORD_CHARS_MAX && step.ms == 0.0));
        assert!(
            said.versions.iter().all(|(name, value)| name.len() <= WORD_CHARS_MAX && value.len() <= WORD_CHARS_MAX)
        );
    }
}
