//! Deaths at any moment of a life that does nothing but attach, write, copy, make flat and detach.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use host_agent::disk::{DiskChoice, Disks};

use crate::guest::{CHUNKS, MIB, Place, marks, open, write};

const UID: u32 = 0x4000_1234;
const SOME: u32 = 12;
const MANY: u32 = 300;

#[test]
#[ignore = "runs as the init of a guest that another test boots"]
fn many_deaths() {
    if let Some(place) = Place::in_guest() {
        storm(&place, MANY);
    }
}

pub fn some_deaths(place: &Place) {
    storm(place, SOME);
}

fn storm(place: &Place, deaths: u32) {
    let disks = place.disks(DiskChoice::DeviceMapper, &[]);
    place.make(&disks, "victim");
    drop(disks);
    let mut copies = 0;
    for death in 0..deaths {
        let mut child = Place::begin("storm", None);
        // Spread over a life, and the same each time.
        std::thread::sleep(Duration::from_millis(300 + u64::from(death.wrapping_mul(2_654_435_761) >> 23)));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL), "it had failed before");
        let is_known = death % 2 == 0;
        let disks = place.disks(DiskChoice::DeviceMapper, if is_known { &[7] } else { &[] });
        disks.detach(7).unwrap();
        assert_eq!(place.left(), (0, 0), "after death {death}");
        // A copy that bears its name is whole: it was made between two writes.
        for name in ["copy", "flat"] {
            let whole = place.disk(name).with_file_name("whole");
            if !whole.exists() {
                continue;
            }
            disks.restore(&whole, &place.disk("child"), UID).unwrap();
            let shown = place.attach(&disks, 8, "child").unwrap();
            let found = marks(&open(&shown));
            let round = found[0];
            assert!(found[..64].iter().all(|mark| *mark == round), "{name} is of two rounds");
            disks.detach(8).unwrap();
            copies += 1;
        }
        // And what goes on is readable: each chunk is one that was written there.
        let device = place.attach(&disks, 7, "victim").unwrap();
        marks(&open(&device));
        disks.detach(7).unwrap();
    }
    assert!(copies > 0, "no life was long enough to leave a copy");
    println!("  {deaths} deaths, {copies} copies looked at");
    for name in ["victim", "copy", "flat", "child"] {
        let _ = fs::remove_dir_all(place.disk(name).parent().unwrap());
    }
}

/// Rounds of a life, each with a mark of its own in the first 64 chunks.
pub fn work(place: &Place, disks: &Disks) {
    let disk = place.disk("victim");
    for round in (0..26).cycle() {
        let mark = char::from(b'a' + round);
        let device = open(&place.attach(disks, 7, "victim").unwrap());
        for at in (0..64).chain((u64::from(round)..CHUNKS).step_by(97)) {
            write(&device, mark, at);
        }
        let copy = place.disk("copy");
        disks.snapshot(7, &disk, &copy, MIB).unwrap();
        fs::rename(&copy, copy.with_file_name("whole")).unwrap();
        drop(device);
        disks.detach(7).unwrap();
        let flat = place.disk("flat");
        disks.chosen().flatten(&disk, &flat, UID).unwrap();
        fs::rename(&flat, flat.with_file_name("whole")).unwrap();
    }
}
