//! The corpora of `fuzz/`, and mutations of them, through the functions that the fuzzers call: no panic, and none takes long.
//!
//! The mutations come from a fixed seed, so that a failure is one that comes again; `make fuzz` looks further.

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use envd::fuzzing::{TARGETS, Target};

const SEED: u64 = 0x5eed_0fe4_7d00;
/// Of each target: a second or two.
const MUTATIONS: usize = 4000;
/// For one input of 64 KiB at most, compiled for debugging, on a machine that does something else, too. One that loops takes for ever.
const INPUT_TIME_MAX: Duration = Duration::from_secs(5);
/// Mutations that make inputs longer stop there.
const INPUT_BYTES_MAX: usize = 16 * 1024;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz")
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    let folder = fuzz().join("corpus").join(target);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn check(name: &str, target: Target, input: &[u8]) {
    let began = Instant::now();
    let done = catch_unwind(AssertUnwindSafe(|| target(input)));
    assert!(done.is_ok(), "{name} panicked on \"{}\" (seed {SEED:#x})", input.escape_ascii());
    let took = began.elapsed();
    assert!(took < INPUT_TIME_MAX, "{name} took {took:?} for \"{}\" (seed {SEED:#x})", input.escape_ascii());
}

#[test]
fn every_target_has_a_program_and_a_corpus() {
    let named: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    for folder in ["fuzz_targets", "corpus"] {
        let there: BTreeSet<String> = fs::read_dir(fuzz().join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(there, named, "in fuzz/{folder}");
    }
}

#[test]
fn corpora_replay() {
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        assert!(seeds.len() >= 3, "the corpus of {name} says little");
        seeds.iter().for_each(|seed| check(name, target, seed));
        check(name, target, &[]);
    }
}

#[test]
fn mutated_corpora_replay() {
    println!("seed {SEED:#x}");
    for (name, target) in TARGETS {
        let seeds = seeds(name);
        let mut dice = Dice(SEED);
        for _ in 0..MUTATIONS {
            let mut input = seeds[dice.below(seeds.len())].clone();
            for _ in 0..=dice.below(4) {
                mutate(&mut input, &seeds, &mut dice);
            }
            input.truncate(INPUT_BYTES_MAX);
            check(name, target, &input);
        }
    }
}

/// One of what fuzzers do first.
fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], dice: &mut Dice) {
    /// What parsers trip over: ends, quotes, signs, numbers at the edge of their types.
    const WORDS: [&[u8]; 14] = [
        b"\r\n",
        b"\n",
        b"\0",
        b"\"",
        b"\\",
        b"%",
        b"--",
        b";",
        b"=",
        b":",
        b"-1",
        b"18446744073709551616",
        b"\xff",
        b"\xc3",
    ];
    let at = dice.below(input.len() + 1);
    let length = dice.below(input.len() - at + 1).min(dice.below(64));
    match dice.below(6) {
        0 if at < input.len() => input[at] ^= 1 << dice.below(8),
        1 => drop(input.drain(at..at + length)),
        2 => drop(input.splice(at..at, WORDS[dice.below(WORDS.len())].iter().copied())),
        3 => {
            let again = input[at..at + length].to_vec();
            for _ in 0..=dice.below(8) {
                input.splice(at..at, again.iter().copied());
            }
        }
        4 => {
            let other = &seeds[dice.below(seeds.len())];
            let from = dice.below(other.len() + 1);
            input.splice(at..at + length, other[from..].iter().copied());
        }
        _ => input.truncate(at),
    }
}

/// splitmix64: enough to choose by, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound.max(1) as u64).expect("it is below a usize")
    }
}
